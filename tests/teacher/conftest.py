"""A small teacher over real shards, as a server would hold it: three pairs, random weights of a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from m2mkd_ds.config import RunConfig, from_dict
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import stage_spans, teaching_pairs
from m2mkd_ds.models.vit import VitArch, build_stage
from m2mkd_ds.teacher.protocol.handshake import fingerprints
from m2mkd_ds.teacher.protocol.wire import Limits
from m2mkd_ds.teacher.server.produce import Producer, TeacherParts
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService

if TYPE_CHECKING:
    from m2mkd_ds.teacher.client.remote import RemoteFeed
    from tests.teacher.town import Setting

LIMITS = Limits(max_count=64, max_answer_bytes=64 * 2**20, max_in_flight=4, heartbeat_s=1.0)


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and validation/; tests must not change it."""
    folder = tmp_path_factory.mktemp("teacher_shards")
    make_source("digits", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(digits_shards: Path) -> RunConfig:
    """Teacher of 6 blocks and width 32 in 3 modules, meta model of 3 blocks; images of 16 pixels, mixed and erased."""
    return from_dict(
        {
            "name": "tiny", "run_dir": "unused", "seed": 7,
            "data": {
                "train": str(digits_shards / "train"), "validation": str(digits_shards / "validation"), "num_classes": 10, "image_size": 16,
                "num_workers": 0, "augment": {"mixup": 0.2, "cutmix": 1.0, "random_erase": 0.25, "label_smoothing": 0.1, "mix_group": 2},
            },
            "teacher": {
                "arch": "vit_tiny_patch16_224", "arch_args": {"embed_dim": 32, "depth": 6, "num_heads": 2, "patch_size": 4},
                "depths": [2, 2, 2],
            },
            "meta": {"depths": [1, 1, 1]},
            "student": {"embed_dim": 16, "num_heads": 2, "patch_size": 4, "depths": [1, 1, 1], "moe": {"num_experts": 2}},
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_index(tiny_config: RunConfig) -> ShardIndex:
    """The training shards."""
    return ShardIndex.load(tiny_config.data.train)


def make_parts(config: RunConfig, index: ShardIndex, dtype: torch.dtype = torch.float32) -> TeacherParts:
    """The models of `config` with fresh weights: the same for the same config."""
    pairs = teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)
    meta_arch, teacher_arch = VitArch.from_meta(config), VitArch.from_teacher(config)
    stages: dict[int, nn.Module] = {
        i: build_stage(meta_arch, span, seed=config.seed).to(dtype) for i, span in enumerate(stage_spans(config.meta.depths))
    }
    teachers = {pair.index: build_stage(teacher_arch, pair.teacher, seed=config.seed + 1).to(dtype) for pair in pairs}
    return TeacherParts(
        index=index, data=config.data, seed=config.seed, pairs=pairs, meta=FrozenMeta(stages), teachers=teachers,
        device=torch.device("cpu"), dtype=dtype,
    )  # fmt: skip


def tiny_fingerprints(config: RunConfig, index: ShardIndex) -> dict[str, str]:
    """As a server of `config` would state them, with made-up hashes of weights."""
    weights = {"meta": "0" * 64, **{f"teacher.{i}": str(i) * 64 for i in range(config.num_stages)}}
    return fingerprints(config, index, precision="fp32", weights=weights)


@pytest.fixture
def make_service(tiny_config: RunConfig, tiny_index: ShardIndex) -> Iterator[Callable[..., TeacherService]]:
    """make_service(limits=..., max_bytes=...) -> a service over the tiny teacher; closed after the test."""
    made: list[TeacherService] = []

    def make(limits: Limits = LIMITS, max_bytes: int = 256 * 2**20) -> TeacherService:
        producer = Producer(make_parts(tiny_config, tiny_index))
        options = ServiceOptions(limits=limits, max_bytes=max_bytes)
        made.append(TeacherService(producer, tiny_fingerprints(tiny_config, tiny_index), options))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture(scope="module")
def shared_producer(tiny_config: RunConfig, tiny_index: ShardIndex) -> Iterator[Producer]:
    """One for all tests of a file: services are cheap, models and workers are not."""
    producer = Producer(make_parts(tiny_config, tiny_index))
    yield producer
    producer.close()


@pytest.fixture
def sharing_service(shared_producer: Producer, tiny_config: RunConfig, tiny_index: ShardIndex) -> Callable[..., TeacherService]:
    """sharing_service(limits=...) -> another service of the shared producer."""

    def make(limits: Limits = LIMITS) -> TeacherService:
        options = ServiceOptions(limits=limits, max_bytes=256 * 2**20)
        return TeacherService(shared_producer, tiny_fingerprints(tiny_config, tiny_index), options)

    return make


@pytest.fixture(scope="module")
def setting(tiny_config: RunConfig, tiny_index: ShardIndex) -> Setting:
    """The tiny run with its undisturbed batches (town.py)."""
    from tests.teacher.town import make_setting  # it imports this file

    return make_setting(tiny_config, tiny_index)


@pytest.fixture
def open_feed(setting: Setting) -> Iterator[Callable[..., RemoteFeed]]:
    """open_feed(town, config, ...) -> a feed; closed after the test, and no thread of it may be left."""
    from tests.teacher.town import feeds_of

    with feeds_of(setting) as make:
        yield make

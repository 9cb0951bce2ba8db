"""Validation images from a server: the batches of EvalLoader, for a trainer that has the index alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import RunConfig, TeacherConfig
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.client.links import TeacherLostError, TeacherRefusedError
from m2mkd_ds.teacher.client.remote_images import RemoteEvalLoader
from m2mkd_ds.teacher.protocol.answer_check import answer_shapes
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.wire import FeedError, GetBatch, Hello
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints

SETTINGS = TeacherConfig(feed="remote", endpoints=("127.0.0.1:1",), deadline_s=5.0, patience_s=5.0, prefetch=2)


@pytest.fixture
def validation(tiny_config: RunConfig) -> ShardIndex:
    return ShardIndex.load(tiny_config.data.validation)


def service_of(config: RunConfig, index: ShardIndex, validation: ShardIndex | None) -> TeacherService:
    parts = replace(make_parts(config, index), validation=validation)
    return TeacherService(Producer(parts), tiny_fingerprints(config, index), ServiceOptions(limits=LIMITS, max_bytes=2**28))


def remote(
    config: RunConfig, index: ShardIndex, validation: ShardIndex, service: TeacherService, rank: int = 0, settings: TeacherConfig = SETTINGS
) -> RemoteEvalLoader:
    return RemoteEvalLoader(
        validation, config.data, settings, lambda endpoint: LocalConnection(service, endpoint), answer_shapes(config, precision="fp32"),
        tiny_fingerprints(config, index), batch_size=50, rank=rank, world=2, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("decode", ["pil", "fast"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_batches_are_those_of_a_local_loader(
    tiny_config: RunConfig, tiny_index: ShardIndex, validation: ShardIndex, decode: str, rank: int, tmp_path: Path
) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, decode=decode))
    for name in ("index.json", "index.npy"):
        shutil.copy(Path(tiny_config.data.validation) / name, tmp_path / name)
    bare = ShardIndex.load_unchecked(tmp_path)  # no shards beside it
    loader = remote(config, tiny_index, bare, service_of(config, tiny_index, validation), rank)
    ours = list(EvalLoader(validation, config.data, batch_size=50, rank=rank, world=2))
    theirs = list(loader)
    assert len(theirs) == len(ours) == len(loader) and len(ours[-1].labels_B) < 50  # the last one is short
    for a, b in zip(ours, theirs, strict=True):
        assert all(
            torch.equal(getattr(a, name), getattr(b, name)) for name in ("images_BCHW", "targets_BV", "labels_B", "slot_ids_B")
        )
    assert len(list(loader)) == len(ours)  # and once more, as a run evaluates several times


def test_a_server_of_other_images_is_found_by_its_labels(tiny_config: RunConfig, tiny_index: ShardIndex, validation: ShardIndex) -> None:
    other = service_of(tiny_config, tiny_index, tiny_index)  # shows training images instead
    with pytest.raises(TeacherLostError, match="does not hold the labels of this trainer's index"):
        # At the first batch, which is as long as it should be.
        next(iter(remote(tiny_config, tiny_index, validation, other, settings=replace(SETTINGS, patience_s=1.0, deadline_s=1.0))))


def test_a_server_without_validation_images_says_so(tiny_config: RunConfig, tiny_index: ShardIndex, validation: ShardIndex) -> None:
    with pytest.raises(TeacherRefusedError, match="has no validation images; start it where data.validation is"):
        list(remote(tiny_config, tiny_index, validation, service_of(tiny_config, tiny_index, None)))


def test_a_damaged_validation_image_ends_the_evaluation_with_its_name(
    tiny_config: RunConfig, tiny_index: ShardIndex, validation: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ShardIndex, sample: int) -> tuple[bytes, int, str]:
        raise SampleError(f"{self.describe(sample)}: other bytes than were indexed", "checksum")

    monkeypatch.setattr(ShardIndex, "read", broken)
    with pytest.raises(TeacherRefusedError, match="a validation image cannot be read: .*other bytes than were indexed"):
        list(remote(tiny_config, tiny_index, validation, service_of(tiny_config, tiny_index, validation)))


def test_a_batch_beyond_the_last_is_refused(
    make_service: Callable[..., TeacherService], tiny_config: RunConfig, tiny_index: ShardIndex, validation: ShardIndex
) -> None:
    service = service_of(tiny_config, tiny_index, validation)
    layout = BatchLayout(micro_batch_size=50, accumulation=1, world=2)
    hello = Hello(
        oldest_protocol=2, newest_protocol=2, client="c", rank=0, layout=layout, pairs=(0,), payload="evaluation", wire_dtype="fp32",
        with_teacher=False, fingerprints=tiny_fingerprints(tiny_config, tiny_index),
    )  # fmt: skip
    welcome = service.hello(hello)
    request = GetBatch(
        instance=welcome.instance, plan=welcome.plan, client="c", layout=layout, start=layout.positions(1000, 0, 0).start, pairs=(0,),
        payload="evaluation", wire_dtype="fp32", with_teacher=False, attempt=0,
    )  # fmt: skip
    with pytest.raises(FeedError, match="rank 0 has .* evaluation batches, number 1000 was asked for") as refused:
        service.get(request)
    assert refused.value.code == "bad_request"

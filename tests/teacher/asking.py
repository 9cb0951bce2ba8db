"""Requests as a trainer would make them, and a server of counted models, for the tests of the server's core."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.teacher.protocol.handshake import plan_digest
from m2mkd_ds.teacher.protocol.wire import GetBatch, Limits
from m2mkd_ds.teacher.server.produce import Producer, TeacherParts
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)
ALL = (0, 1, 2)


def asked(service: TeacherService | None, start: int = 0, pairs: tuple[int, ...] = ALL, **changes: Any) -> GetBatch:
    """A good request, with changes; without a service one that a bare Producer takes."""
    request = GetBatch(
        instance=service.instance if service else "", plan="", client="test", layout=LAYOUT, start=start, pairs=pairs, payload="hidden",
        wire_dtype="fp32", with_teacher=True, attempt=0,
    )  # fmt: skip
    request = replace(request, **changes)
    if service and "plan" not in changes:
        request = replace(request, plan=plan_digest(service._fingerprints, request.layout))
    return request


def service_of(
    producer: Producer, config: RunConfig, index: ShardIndex, limits: Limits = LIMITS, *, max_bytes: int = 2**28, **more: Any
) -> TeacherService:
    return TeacherService(producer, tiny_fingerprints(config, index), ServiceOptions(limits=limits, max_bytes=max_bytes), **more)


def counted_parts(config: RunConfig, index: ShardIndex) -> tuple[TeacherParts, Counter[str]]:
    """Models that count their runs as `meta I` and `teacher I`."""
    parts, calls = make_parts(config, index), Counter[str]()

    def count(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: calls.update([name]))

    for i, stage in parts.meta.stages.items():
        count(stage, f"meta {i}")
    for i, teacher in parts.teachers.items():
        count(teacher, f"teacher {i}")
    return parts, calls


def colocated(config: RunConfig, index: ShardIndex, num_steps: int, layout: BatchLayout = LAYOUT) -> dict[int, TeacherBatch]:
    """What the default feed gives to every rank, by first position."""
    batches = {}
    for rank in range(layout.world):
        parts = make_parts(config, index)
        loader = TrainLoader(
            index, config.data, seed=config.seed, micro_batch_size=layout.micro_batch_size, accumulation=layout.accumulation, rank=rank,
            world=layout.world, start_step=0, total_steps=num_steps, raise_lost=False,
        )  # fmt: skip
        feed = ColocatedFeed(loader, parts.pairs, parts.meta, parts.teachers, device=parts.device, dtype=parts.dtype)
        for step in range(num_steps):
            for micro_step in range(layout.accumulation):
                slots = layout.positions(step, micro_step, rank)
                batches[slots.start] = feed.batch(BatchRequest(step, micro_step, slots, ALL, True))
        feed.close()
    return batches


def assert_same(tensors: dict[str, Tensor], ours: TeacherBatch, pairs: tuple[int, ...] = ALL) -> None:
    """Bit for bit what the colocated feed gave."""
    for i in pairs:
        if i:
            assert torch.equal(tensors[f"hidden.{i}"], ours.hidden[i])
        assert torch.equal(tensors[f"logits.{i}"], ours.teacher_logits[i])
    assert torch.equal(tensors["targets"], ours.targets_BV)

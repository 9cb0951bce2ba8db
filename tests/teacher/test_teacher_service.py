"""A service without a transport: greetings, answers by slots, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, FeedError, GetBatch, Hello
from m2mkd_ds.teacher.server.service import TeacherService
from tests.teacher.conftest import make_parts, tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)


def hello_of(config: RunConfig, index: ShardIndex) -> Hello:
    return Hello(
        oldest_protocol=2, newest_protocol=PROTOCOL_VERSION, client="test", rank=1, layout=LAYOUT, pairs=(0, 1, 2), payload="hidden",
        wire_dtype="fp32", with_teacher=True, fingerprints=tiny_fingerprints(config, index),
    )  # fmt: skip


def test_an_answer_holds_the_bytes_that_a_colocated_feed_makes(
    make_service: Callable[..., TeacherService], tiny_config: RunConfig, tiny_index: ShardIndex
) -> None:
    link = LocalConnection(make_service())
    welcome = link.hello(hello_of(tiny_config, tiny_index), 5.0)
    parts = make_parts(tiny_config, tiny_index)
    loader = TrainLoader(
        tiny_index, tiny_config.data, seed=7, micro_batch_size=4, accumulation=2, rank=1, world=2, start_step=0, total_steps=3
    )
    feed = ColocatedFeed(loader, parts.pairs, parts.meta, parts.teachers, device=parts.device, dtype=parts.dtype)
    for step in range(3):
        for micro_step in range(2):
            slots = LAYOUT.positions(step, micro_step, 1)
            ours = feed.batch(BatchRequest(step, micro_step, slots, (0, 1, 2), True))
            request = GetBatch(
                instance=welcome.instance, plan=welcome.plan, client="test", layout=LAYOUT, start=slots.start, pairs=(0, 1, 2),
                payload="hidden", wire_dtype="fp32", with_teacher=True, attempt=0,
            )  # fmt: skip
            answer = link.get(request, 5.0)
            assert answer.head.answers(request) and (answer.head.step, answer.head.micro_step) == (step, micro_step)
            for i in (1, 2):
                assert torch.equal(answer.tensors[f"hidden.{i}"], ours.hidden[i])
            for i in (0, 1, 2):
                assert torch.equal(answer.tensors[f"logits.{i}"], ours.teacher_logits[i])
            assert torch.equal(answer.tensors["targets"], ours.targets_BV)
            assert torch.equal(answer.tensors["image.pixels"], ours.hidden[0])  # decode=pil: done in the worker


def test_another_plan_is_refused_by_name(
    make_service: Callable[..., TeacherService], tiny_config: RunConfig, tiny_index: ShardIndex
) -> None:
    link = LocalConnection(make_service())
    other = replace(tiny_config, seed=8)
    with pytest.raises(FeedError, match=r"seed: the trainer has 8, the server has 7") as refused:
        link.hello(hello_of(other, tiny_index), 5.0)
    assert refused.value.code == "mismatch"


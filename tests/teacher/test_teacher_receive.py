"""Answers become batches only when every tensor is what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import teaching_pairs
from m2mkd_ds.teacher.client.receive import Assembler
from m2mkd_ds.teacher.feed import BatchRequest
from m2mkd_ds.teacher.protocol.answer_check import AnswerShapes
from m2mkd_ds.teacher.protocol.numbers import to_wire
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, Event, FeedError, GetBatch, LinkError

LAYOUT = BatchLayout(micro_batch_size=2, accumulation=1, world=1)
REQUEST = GetBatch(
    instance="i", plan="p", client="c", layout=LAYOUT, start=0, pairs=(0, 1), payload="hidden", wire_dtype="fp32", with_teacher=True,
    attempt=0,
)  # fmt: skip


def make_assembler(config: RunConfig, dtype: torch.dtype = torch.float32) -> Assembler:
    pairs = teaching_pairs((1, 1, 1), (1, 1, 1), (1, 1, 1))
    data = replace(config.data, decode="fast", num_classes=10, image_size=16)
    shapes = AnswerShapes(num_classes=10, tokens=3, width=4, image_size=16, fast=True, logits_dtype="fp32")
    return Assembler(data, pairs, FrozenMeta({}), shapes, device=torch.device("cpu"), dtype=dtype)


def make_answer() -> Answer:
    """An answer to REQUEST as a server with data.decode=fast gives it: two images of 16 pixels, one erased."""
    tensors: dict[str, Tensor] = {
        "hidden.1": torch.arange(2 * 3 * 4).view(2, 3, 4).float(), "targets": torch.full((2, 10), 0.1),
        "image.pixels": torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "image.labels": torch.tensor([3, 4]),
        "image.erase": torch.tensor([[1, 0, 2, 4, 5, 99]]), "logits.0": torch.zeros(2, 10), "logits.1": torch.ones(2, 10),
    }  # fmt: skip
    head = AnswerHead(
        instance="i", plan="p", start=0, pairs=(0, 1), payload="hidden", wire_dtype="fp32", with_teacher=True, attempt=0, erase_pixels=20,
    )  # fmt: skip
    return Answer(head, tensors)


def test_a_whole_answer_passes_and_is_taken_apart(tiny_config: RunConfig) -> None:
    assembler = make_assembler(tiny_config, torch.bfloat16)
    sent = dict(make_answer().tensors)
    answer = assembler.receive(make_answer(), REQUEST)
    batch = assembler.batch(answer, BatchRequest(0, 0, range(2), (0, 1), True), 0.25)
    assert batch.hidden[1].dtype == torch.bfloat16 and batch.hidden[1].float().equal(sent["hidden.1"])  # below 256: exact
    assert batch.hidden[0].shape == (2, 3, 16, 16) and batch.hidden[0].dtype == torch.bfloat16
    # The first image is black: (0 - mean) / std in every channel; the second has noise in rows 0..3, columns 2..6.
    black_C = -torch.tensor(tiny_config.data.mean) / torch.tensor(tiny_config.data.std)
    assert torch.equal(batch.hidden[0][0], black_C.bfloat16()[:, None, None].expand(3, 16, 16))
    differs_HW = (batch.hidden[0][1] != batch.hidden[0][0]).all(0)
    assert differs_HW[0:4, 2:7].all() and differs_HW.sum() == 20
    assert batch.targets_BV.equal(torch.full((2, 10), 0.1)) and batch.slot_ids_B.tolist() == [0, 1] and batch.wait_s == 0.25
    assert batch.teacher_logits[1].equal(torch.ones(2, 10)) and batch.teacher_logits.keys() == {0, 1}


@pytest.mark.parametrize("asked", [(0, 0, 2), (1, 0, 0), (0, 1, 0)])
def test_an_answer_of_another_place_never_becomes_a_batch(tiny_config: RunConfig, asked: tuple[int, int, int]) -> None:
    step, micro_step, start = asked  # the answer is that of step 0, micro-step 0, position 0
    with pytest.raises(RuntimeError, match=f"step {step}.{micro_step} at stream position {start} .* of step 0.0 at position 0"):
        make_assembler(tiny_config).batch(make_answer(), BatchRequest(step, micro_step, range(start, start + 2), (1,), False), 0.0)


def test_an_answer_that_cannot_be_is_damage_and_one_that_is_not_finite_is_poison(tiny_config: RunConfig) -> None:
    lacking, poisoned = make_answer(), make_answer()
    del lacking.tensors["hidden.1"]
    with pytest.raises(LinkError, match="lacks .'hidden.1'.") as refused:
        make_assembler(tiny_config).receive(lacking, REQUEST)
    assert refused.value.fault == "corrupt"
    poisoned.tensors["logits.1"][0, 0] = torch.nan
    with pytest.raises(FeedError, match="logits.1 of slots 0 to 1 is not finite"):
        make_assembler(tiny_config).receive(poisoned, REQUEST)


def test_eight_bits_are_spread_by_their_scale(tiny_config: RunConfig) -> None:
    answer, request = make_answer(), replace(REQUEST, wire_dtype="int8")
    hidden = answer.tensors["hidden.1"]
    sent = to_wire(hidden, "int8")
    answer = Answer(replace(answer.head, wire_dtype="int8"), answer.tensors | {f"hidden.1{suffix}": t for suffix, t in sent.items()})
    assembler = make_assembler(tiny_config)
    batch = assembler.batch(assembler.receive(answer, request), BatchRequest(0, 0, range(2), (1,), False), 0.0)
    # A token's 4 numbers share the scale largest / 127; rounding is off by half a scale at most. The largest is 23.
    assert batch.hidden[1].dtype == torch.float32 and 0 < (batch.hidden[1] - hidden).abs().max() <= 23 / 254 + 1e-6


@dataclass
class Lent:
    """Memory that somebody wants back."""

    ended: list[Event | None] = field(default_factory=list)

    def end(self, after: Event | None) -> None:
        self.ended.append(after)


def test_memory_of_an_answer_is_given_back_once_it_is_a_batch(tiny_config: RunConfig) -> None:
    lent = Lent()
    answer = replace(make_answer(), lease=lent)
    assembler = make_assembler(tiny_config)
    kept = assembler.receive(answer, REQUEST)
    assert lent.ended == []
    batch = assembler.batch(kept, BatchRequest(0, 0, range(2), (0, 1), True), 0.0)
    assert lent.ended == [None] and kept.tensors == {} and batch.hidden[1].shape == (2, 3, 4)


def test_a_lost_batch_says_so(tiny_config: RunConfig) -> None:
    assembler = make_assembler(tiny_config)
    for pairs in ((0,), (1,)):
        answer = make_answer()
        lost = Answer(replace(answer.head, lost="the disk is gone"), answer.tensors)
        assert assembler.batch(lost, BatchRequest(0, 0, range(2), pairs, False), 0.0).lost == "the disk is gone"

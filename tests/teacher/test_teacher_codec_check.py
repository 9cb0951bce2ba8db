"""Answers are judged by what was asked, before there is room for them: a confused or malicious server gives nothing to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher import codec
from m2mkd_ds.teacher.answer_check import AnswerShapes, answer_shapes, check_answer, check_specs, is_finite
from m2mkd_ds.teacher.buffers import BufferPool
from m2mkd_ds.teacher.produce import Producer
from m2mkd_ds.teacher.wire import Answer, AnswerHead, FeedError, GetBatch, LinkError, Payload
from tests.teacher.conftest import make_parts

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)
SHAPES = AnswerShapes(num_classes=10, tokens=17, width=200, image_size=16, fast=True, logits_dtype="bf16")
REQUEST = GetBatch(
    instance="i", plan="p", client="c", layout=LAYOUT, start=20, pairs=(0, 2), payload="hidden", wire_dtype="int8", with_teacher=True,
    attempt=1,
)  # fmt: skip


def good() -> Answer:
    """Position 20 of micro-batches of 4, 4 of them a step: step 1 begins at 16, group 1 is rank 0's micro-step 1."""
    head = AnswerHead(
        instance="i", plan="p", start=20, pairs=(0, 2), payload="hidden", wire_dtype="int8", with_teacher=True, attempt=1, step=1,
        micro_step=1, fallbacks=4, erase_pixels=2 * 3 + 16 * 16, bad=(BadSample("io", "s", "k", 1, 23, 9, "gone"),),
    )  # fmt: skip
    boxes = torch.tensor([[0, 14, 13, 2, 3, 99], [3, 0, 0, 16, 16, -1]])
    tensors = {
        "hidden.2": torch.ones(4, 17, 200, dtype=torch.int8),
        "hidden.2.scale": torch.ones(4, 17, 2),  # 200 numbers: groups of 128 and 72
        "targets": torch.full((4, 10), 0.1),
        "image.pixels": torch.zeros(4, 16, 16, 3, dtype=torch.uint8),
        "image.labels": torch.tensor([0, 9, 3, 3]),
        "image.flip": torch.tensor([True, False, True, False]),
        "image.erase": boxes,
        "image.shares": torch.tensor([[0.5, 0.5, 1.0, 0.0]] * 2),
        "image.boxes": torch.tensor([[0, 16, 3, 9]] * 2),
        "logits.0": torch.zeros(4, 10, dtype=torch.bfloat16),
        "logits.2": torch.zeros(4, 10, dtype=torch.bfloat16),
    }
    return Answer(head, tensors)


def test_the_answer_that_was_asked_for_passes() -> None:
    check_answer(good(), REQUEST, SHAPES)
    answer = good()
    for name in ("image.flip", "image.shares", "image.boxes"):
        del answer.tensors[name]
    check_answer(answer, REQUEST, SHAPES)


def change_of(name: str, value: Any) -> Callable[[Answer], Answer]:
    """An answer with one tensor changed, or, by None, left out."""

    def change(answer: Answer) -> Answer:
        tensors = {**answer.tensors, name: value}
        return Answer(answer.head, {n: t for n, t in tensors.items() if t is not None})

    return change


def head_of(**fields: Any) -> Callable[[Answer], Answer]:
    return lambda answer: Answer(replace(answer.head, **fields), answer.tensors)


SHAPE_FAULTS: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "hidden lacks": (change_of("hidden.2", None), r"lacks \['hidden.2'\]"),
    "scale lacks": (change_of("hidden.2.scale", None), r"lacks \['hidden.2.scale'\]"),
    "targets lack": (change_of("targets", None), r"lacks \['targets'\]"),
    "logits lack": (change_of("logits.0", None), r"lacks \['logits.0'\]"),
    "labels lack": (change_of("image.labels", None), r"lacks \['image.labels'\]"),
    "hidden of pair 0": (change_of("hidden.0", torch.zeros(1)), r"has \['hidden.0'\] that was not asked for"),
    "another pair": (change_of("logits.1", torch.zeros(4, 10)), r"has \['logits.1'\]"),
    "targets of float images": (change_of("image.targets", torch.zeros(4, 10)), r"has \['image.targets'\]"),
    "another wire dtype": (
        change_of("hidden.2", torch.zeros(4, 17, 200)), r"hidden.2 is fp32 \[4, 17, 200\]; expected int8 \[4, 17, 200\]",
    ),
    "more images": (change_of("hidden.2", torch.zeros(5, 17, 200, dtype=torch.int8)), r"\[5, 17, 200\]"),
    "other tokens": (change_of("hidden.2", torch.zeros(4, 16, 200, dtype=torch.int8)), r"\[4, 16, 200\]"),
    "flat": (change_of("hidden.2", torch.zeros(4, 3400, dtype=torch.int8)), r"\[4, 3400\]"),
    "one scale a token": (change_of("hidden.2.scale", torch.ones(4, 17, 1)), r"expected fp32 \[4, 17, 2\]"),
    "other classes": (change_of("logits.2", torch.zeros(4, 11, dtype=torch.bfloat16)), r"expected bf16 \[4, 10\]"),
    "logits of another precision": (change_of("logits.2", torch.zeros(4, 10)), "logits.2 is fp32"),
    "float pixels": (change_of("image.pixels", torch.zeros(4, 3, 16, 16)), r"expected uint8 \[4, 16, 16, 3\]"),
    "no erased box": (change_of("image.erase", torch.zeros(0, 6, dtype=torch.int64)), r"expected int64 \['up to 4', 6\]"),
    "boxes without shares": (change_of("image.shares", None), "one row a mixing group"),
    "more shares": (change_of("image.shares", torch.zeros(4, 4)), "one row a mixing group"),
    "groups of a third": (
        lambda a: change_of("image.shares", torch.zeros(3, 4))(change_of("image.boxes", torch.zeros(3, 4, dtype=torch.int64))(a)),
        "3 groups, which do not divide 4",
    ),
    "erased without boxes": (change_of("image.erase", None), "262 erased pixels and has no image.erase"),
    "another attempt": (head_of(attempt=0), "attempt 0"),
    "another position": (head_of(start=24), "position 24"),
    "another plan": (head_of(plan="q"), "an answer for position"),
    "another step": (head_of(step=2), r"says step 2\.1; position 20 is 1\.1"),
    "another micro-step": (head_of(micro_step=0), r"says step 1\.0"),
    "more fallbacks": (head_of(fallbacks=5), "5 images decoded by Pillow; there are 4"),
    "damage elsewhere": (head_of(bad=(BadSample("io", "s", "k", 1, 24, 9, "gone"),)), "position 24, which is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPE_FAULTS)
def test_other_tensors_are_refused_by_name_before_there_is_room(case: str) -> None:
    change, told = SHAPE_FAULTS[case]
    pool = BufferPool(1, 2**20)
    reader = codec.FrameReader(max_bytes=10**6, pool=pool, accept=lambda head, specs: check_specs(head, specs, REQUEST, SHAPES))
    with pytest.raises(LinkError, match=told) as refused:
        reader.head(codec.encode(change(good())).head)
    assert refused.value.fault == "corrupt" and pool.num_buffers == 0
    with pytest.raises(LinkError, match=told):
        check_answer(change(good()), REQUEST, SHAPES)


def box(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


VALUE_FAULTS: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "label over": (change_of("image.labels", torch.tensor([0, 10, 3, 3])), "image.labels runs from 0 to 10; allowed is 0 to 9"),
    "label under": (change_of("image.labels", torch.tensor([0, -1, 3, 3])), "runs from -1"),
    "target over": (change_of("targets", torch.full((4, 10), 1.5)), "targets runs from 1.5"),
    "target under": (change_of("targets", torch.full((4, 10), -0.1)), "targets runs from -0.1"),
    "share": (change_of("image.shares", torch.full((2, 4), 2.0)), "image.shares"),
    "mix box": (change_of("image.boxes", torch.tensor([[0, 17, 0, 0]] * 2)), "image.boxes"),
    "odd truth": (change_of("image.flip", torch.tensor([1, 0, 2, 0], dtype=torch.uint8).view(torch.bool)), "neither true nor false"),
    "box in no image": (change_of("image.erase", box(4, 0, 0, 1, 262, 0)), "outside of the images"),
    "box in a negative image": (change_of("image.erase", box(-1, 0, 0, 1, 1, 0)), "outside"),
    "box over the edge": (change_of("image.erase", box(0, 15, 0, 2, 1, 0)), "outside"),
    "negative box": (change_of("image.erase", box(0, 0, 0, -1, -262, 0)), "outside"),
    "box that overflows": (change_of("image.erase", box(0, 2**62, 0, 2**62, 1, 0)), "outside"),
    "other area": (change_of("image.erase", box(0, 0, 0, 16, 16, 0)), "covers 256 pixels, the answer says 262"),
}


@pytest.mark.parametrize("case", VALUE_FAULTS)
def test_numbers_that_point_somewhere_else_are_refused(case: str) -> None:
    change, told = VALUE_FAULTS[case]
    with pytest.raises(LinkError, match=told) as refused:
        check_answer(change(good()), REQUEST, SHAPES)
    assert refused.value.fault == "corrupt"


@pytest.mark.parametrize("name", ["targets", "logits.2", "hidden.2.scale", "image.shares"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_poisoned_with_its_slots(name: str, value: float) -> None:
    answer = good()
    answer.tensors[name].view(-1)[3] = value
    with pytest.raises(FeedError, match=f"{name} of slots 20 to 23") as refused:
        check_answer(answer, REQUEST, SHAPES)
    assert refused.value.code == "poisoned" and refused.value.slots == (20, 21, 22, 23)


def test_hidden_states_are_searched_for_nan_when_asked_to() -> None:
    request = replace(REQUEST, wire_dtype="fp16", pairs=(2,), with_teacher=False)
    head = replace(good().head, wire_dtype="fp16", pairs=(2,), with_teacher=False, erase_pixels=0)
    hidden = torch.zeros(4, 17, 200, dtype=torch.float16)
    hidden[3, 16, 199] = float("-inf")
    answer = Answer(head, {"hidden.2": hidden, "targets": torch.full((4, 10), 0.1)})
    check_answer(answer, request, SHAPES, finite=False)
    with pytest.raises(FeedError, match=r"hidden\.2"):
        check_answer(answer, request, SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_found_at_any_place(dtype: torch.dtype) -> None:
    # 1031 numbers: vectorised loops and what is left over behind them
    tensor = torch.linspace(-60000, 60000, 1031).to(dtype)
    assert is_finite(tensor) and is_finite(torch.empty(0, dtype=dtype))
    for place in range(0, 1031, 7):
        for value in (float("nan"), float("inf"), float("-inf")):
            spoilt = tensor.clone()
            spoilt[place] = value
            assert not is_finite(spoilt), (place, value)


@pytest.mark.parametrize("decode", ["pil", "fast"])
def test_what_a_real_server_answers_passes(tiny_config: RunConfig, tiny_index: ShardIndex, decode: Any) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, decode=decode))
    shapes = answer_shapes(config, precision="fp32")
    # 16 pixels in patches of 4: 16 patches and a class token
    assert (shapes.tokens, shapes.width, shapes.num_classes, shapes.fast) == (17, 32, 10, decode == "fast")
    producer = Producer(make_parts(config, tiny_index))
    payloads: tuple[Payload, ...] = ("hidden", "image", "logits")
    for payload, pairs in product(payloads, ((0, 1, 2), (2,))):
        for start in (20, 36):
            request = replace(REQUEST, start=start, pairs=pairs, payload=payload, wire_dtype="fp32")
            answer = producer.answer(request)
            check_answer(answer, request, shapes)
            if payload == "hidden" and 0 not in pairs:
                assert set(answer.tensors) == {"hidden.2", "logits.2", "targets"}
    producer.close()

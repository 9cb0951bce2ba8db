"""Answers become batches only when every tensor is what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import teaching_pairs
from m2mkd_ds.teacher.feed import BatchRequest
from m2mkd_ds.teacher.receive import Assembler
from m2mkd_ds.teacher.wire import Answer, AnswerHead, GetBatch, LinkError

LAYOUT = BatchLayout(micro_batch_size=2, accumulation=1, world=1)
REQUEST = GetBatch(
    instance="i", plan="p", client="c", layout=LAYOUT, start=0, pairs=(0, 1), payload="hidden", wire_dtype="fp32", with_teacher=True,
    attempt=0,
)  # fmt: skip


def make_assembler(config: RunConfig, dtype: torch.dtype = torch.float32) -> Assembler:
    pairs = teaching_pairs((1, 1, 1), (1, 1, 1), (1, 1, 1))
    data = replace(config.data, decode="fast", num_classes=10, image_size=16)
    return Assembler(data, pairs, FrozenMeta({}), device=torch.device("cpu"), dtype=dtype)


def make_answer(**changed: object) -> Answer:
    """An answer to REQUEST as a server with data.decode=fast gives it: two images of 16 pixels, one erased."""
    tensors: dict[str, Tensor] = {
        "hidden.1": torch.arange(2 * 3 * 4).view(2, 3, 4).float(), "targets": torch.full((2, 10), 0.1),
        "image.pixels": torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "image.labels": torch.tensor([3, 4]),
        "image.erase": torch.tensor([[1, 0, 2, 4, 5, 99]]), "logits.0": torch.zeros(2, 10), "logits.1": torch.ones(2, 10),
    }  # fmt: skip
    head = AnswerHead(
        instance="i", plan="p", start=0, pairs=(0, 1), payload="hidden", wire_dtype="fp32", with_teacher=True, attempt=0, erase_pixels=20,
    )  # fmt: skip
    edits: Mapping[str, object] = {name.replace("_", "."): tensor for name, tensor in changed.items()}
    merged = {name: tensor for name, tensor in {**tensors, **edits}.items() if tensor is not None}
    return Answer(head, merged)  # type: ignore[arg-type]


def test_a_whole_answer_passes_and_is_taken_apart(tiny_config: RunConfig) -> None:
    assembler = make_assembler(tiny_config, torch.bfloat16)
    answer = assembler.receive(make_answer(), REQUEST)
    batch = assembler.batch(answer, BatchRequest(0, 0, range(2), (0, 1), True), 0.25)
    assert batch.hidden[1].dtype == torch.bfloat16 and batch.hidden[1].float().equal(answer.tensors["hidden.1"])  # below 256: exact
    assert batch.hidden[0].shape == (2, 3, 16, 16) and batch.hidden[0].dtype == torch.bfloat16
    # The first image is black: (0 - mean) / std in every channel; the second has noise in rows 0..3, columns 2..6.
    black_C = -torch.tensor(tiny_config.data.mean) / torch.tensor(tiny_config.data.std)
    assert torch.equal(batch.hidden[0][0], black_C.bfloat16()[:, None, None].expand(3, 16, 16))
    differs_HW = (batch.hidden[0][1] != batch.hidden[0][0]).all(0)
    assert differs_HW[0:4, 2:7].all() and differs_HW.sum() == 20
    assert batch.targets_BV.equal(torch.full((2, 10), 0.1)) and batch.slot_ids_B.tolist() == [0, 1] and batch.wait_s == 0.25
    assert batch.teacher_logits[1].equal(torch.ones(2, 10)) and batch.teacher_logits.keys() == {0, 1}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"hidden_1": None}, "lacks hidden.1"),
        ({"logits_0": None}, "lacks logits.0"),
        ({"targets": None}, "lacks targets"),
        ({"image_pixels": None}, "lacks image.pixels"),
        ({"hidden_2": torch.zeros(2, 3, 4)}, "holds hidden.2, which was not asked for"),
        ({"hidden_1": torch.zeros(3, 3, 4)}, r"hidden.1 is torch.float32 \[3, 3, 4\]"),
        ({"hidden_1": torch.zeros(2, 3)}, "hidden.1 is"),
        ({"hidden_1": torch.zeros(2, 3, 4).half()}, "hidden.1 is torch.float16"),
        ({"logits_1": torch.zeros(2, 11)}, "logits.1 is"),
        ({"targets": torch.zeros(2, 10).long()}, "targets is torch.int64"),
        ({"image_pixels": torch.zeros(2, 8, 16, 3).byte()}, "image.pixels is"),
        ({"image_erase": torch.tensor([[2, 0, 2, 4, 5, 99]])}, "a box does not lie in its image"),
        ({"image_erase": torch.tensor([[1, 13, 2, 4, 5, 99]])}, "a box does not lie in its image"),
        ({"image_erase": torch.tensor([[1, -1, 2, 4, 5, 99]])}, "a box does not lie in its image"),
        ({"image_erase": torch.tensor([[1, 0, 2, 2**62, 2**62, 99]])}, "a box does not lie in its image"),
        ({"image_erase": torch.tensor([[1, 0, 2, 4, 4, 99]])}, "not as many as the head says"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_is_damage(tiny_config: RunConfig, changed: dict[str, object], told: str) -> None:
    with pytest.raises(LinkError, match=told) as refused:
        make_assembler(tiny_config).receive(make_answer(**changed), REQUEST)
    assert refused.value.fault == "corrupt"


def test_a_lost_batch_says_so(tiny_config: RunConfig) -> None:
    assembler = make_assembler(tiny_config)
    answer = make_answer()
    lost = Answer(replace(answer.head, lost="the disk is gone"), answer.tensors)
    for pairs in ((0,), (1,)):
        assert assembler.batch(lost, BatchRequest(0, 0, range(2), pairs, False), 0.0).lost == "the disk is gone"

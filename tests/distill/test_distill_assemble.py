"""Assembling students and cutting teachers: every key exactly once, and errors that name keys."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.config import RouterConfig
from m2mkd_ds.distill.assemble import assemble_student, pair_stitches, split_exact, union
from m2mkd_ds.distill.pairs import stitch_specs, teaching_pairs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch

PAIRS = teaching_pairs((2, 2, 2), (1, 1, 1), (1, 2, 1))
ARCH = VMoEArch(
    image_size=8, patch_size=4, num_classes=5, embed_dim=16, num_heads=2, mlp_ratio=2.0, num_blocks=4, moe_blocks=(0, 1, 2, 3),
    num_experts=3, router=RouterConfig(), backend="reference",
)  # fmt: skip
WIDTH = 24


def modules() -> dict[int, VisionMoE]:
    made = {}
    for pair in PAIRS:
        stitches = stitch_specs(pair, teacher_width=WIDTH, student_width=ARCH.embed_dim)
        made[pair.index] = VisionMoE(ARCH, pair.student, stitches=stitches, seed=10 + pair.index)
    return made


def states() -> dict[int, dict[str, Tensor]]:
    return {i: dict(module.state_dict()) for i, module in modules().items()}


def assemble(parts: dict[int, dict[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    return assemble_student(parts, PAIRS, ARCH, teacher_width=WIDTH, keep_stitches=keep)


def test_with_kept_stitches_the_whole_model_is_the_chain_of_its_modules() -> None:
    whole = VisionMoE(ARCH, StageSpan.whole(4), stitches=pair_stitches(PAIRS, ARCH, WIDTH), seed=0)
    load_exact(whole, assemble(states(), keep=True))
    images = torch.randn(2, 3, 8, 8)
    x = images
    for module in modules().values():
        x = module(x).output
    assert torch.equal(whole(images).output, x)


def test_dropping_stitches_uses_every_other_key_once() -> None:
    parts = states()
    tensors = assemble(parts, keep=False)
    expected = {key: t for part in parts.values() for key, t in part.items() if not key.startswith("stitches.")}
    assert tensors.keys() == expected.keys() == VisionMoE(ARCH, StageSpan.whole(4), seed=0).state_dict().keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_missing_module_is_named_with_its_blocks() -> None:
    parts = states()
    del parts[1]
    with pytest.raises(ValueError, match=r"pair \[1\] is missing.*blocks\.1\.\.2"):
        assemble(parts, keep=False)


def test_swapped_modules_are_refused_by_their_keys() -> None:
    parts = states()
    parts[0], parts[2] = parts[2], parts[0]
    with pytest.raises(ValueError, match=r"pair 0 does not fit.*blocks\.3\."):
        assemble(parts, keep=False)


def test_a_sparse_module_for_a_dense_student_is_refused_by_its_keys() -> None:
    dense = replace(ARCH, moe_blocks=(0, 1, 2))
    with pytest.raises(ValueError, match=r"pair 2 does not fit.*blocks\.3\.moe\."):
        assemble_student(states(), PAIRS, dense, teacher_width=WIDTH, keep_stitches=False)


def test_modules_without_stitches_cannot_be_assembled_with_them() -> None:
    parts = {i: {k: t for k, t in part.items() if not k.startswith("stitches.")} for i, part in states().items()}
    with pytest.raises(ValueError, match=r"stitches\.0\.post"):
        assemble(parts, keep=True)


def test_union_refuses_a_key_that_comes_twice() -> None:
    with pytest.raises(ValueError, match="w comes from a and from b"):
        union({"a": {"w": torch.zeros(1)}, "b": {"w": torch.zeros(1)}})


def test_splitting_and_joining_give_the_same_tensors() -> None:
    whole = {f"blocks.{i}.w": torch.full((2,), float(i)) for i in range(4)} | {"head.w": torch.ones(1)}
    cut = split_exact(whole, [["blocks.0.w", "blocks.1.w"], ["blocks.2.w"], ["blocks.3.w", "head.w"]])
    assert [sorted(part) for part in cut] == [["blocks.0.w", "blocks.1.w"], ["blocks.2.w"], ["blocks.3.w", "head.w"]]
    assert union({str(i): part for i, part in enumerate(cut)}).keys() == whole.keys()


def test_splitting_refuses_tensors_that_no_stage_takes_or_that_lack() -> None:
    with pytest.raises(ValueError, match="no stage takes .*head.w"):
        split_exact({"a": torch.zeros(1), "head.w": torch.zeros(1)}, [["a"]])
    with pytest.raises(ValueError, match="the model lacks .*'b'"):
        split_exact({"a": torch.zeros(1)}, [["a", "b"]])

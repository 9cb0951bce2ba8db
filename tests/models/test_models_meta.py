"""The meta model: any blocks per stage, hidden states at the boundaries, first weights from a teacher."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from m2mkd_ds.distill.pairs import stage_spans
from m2mkd_ds.models.meta import BoundaryVit, chosen_blocks, meta_from_teacher, run_stages
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, build_stage, load_stage, stage_names

ARGS = {"embed_dim": 48, "num_heads": 3, "patch_size": 8}
TEACHER = VitArch("deit3_small_patch16_224", {**ARGS, "depth": 7}, 5, 32)


def meta_arch(depth: int) -> VitArch:
    return VitArch(TEACHER.arch, TEACHER.arch_args, TEACHER.num_classes, TEACHER.image_size, depth=depth)


def make_images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def whole_timm(depth: int) -> nn.Module:
    torch.manual_seed(depth)
    model = timm.create_model(TEACHER.arch, **{**TEACHER.arch_args, "depth": depth}, num_classes=5, img_size=32).eval()
    with torch.no_grad():  # layer scale starts at 1e-6: without this the blocks would hardly count
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (2, 1, 3), (6,), (1, 4, 1)])
def test_meta_stages_of_any_depth_equal_the_whole_model(depths: tuple[int, ...]) -> None:
    model = whole_timm(sum(depths))
    arch = meta_arch(sum(depths))
    weights = model.state_dict()
    spans = stage_spans(depths)
    stages = [load_stage(arch, span, {name: weights[name] for name in stage_names(arch, span)}).eval() for span in spans]
    with torch.no_grad():
        outputs = run_stages(stages, make_images())
        assert torch.equal(outputs[-1], model(make_images()))
    assert [tuple(x.shape) for x in outputs] == [(2, 17, 48)] * (len(depths) - 1) + [(2, 5)]


def test_boundaries_are_the_outputs_of_the_separate_stages_and_of_timms_blocks() -> None:
    model = whole_timm(6)
    arch, spans = meta_arch(6), stage_spans((2, 1, 3))
    weights = model.state_dict()
    boundary = BoundaryVit(load_stage(arch, StageSpan.whole(6), weights), spans).eval()
    stages = [load_stage(arch, span, {name: weights[name] for name in stage_names(arch, span)}).eval() for span in spans]
    seen: dict[int, torch.Tensor] = {}
    for number in (1, 2):
        model.blocks[number].register_forward_hook(lambda _m, _i, output, number=number: seen.__setitem__(number, output))
    with torch.no_grad():
        logits_BV = model(make_images())
        states = boundary(make_images())
        separate = run_stages(stages, make_images())
    assert len(states) == 3
    for state, other, reference in zip(states, separate, (seen[1], seen[2], logits_BV), strict=True):
        assert torch.equal(state, other) and torch.equal(state, reference)
    assert boundary.state_dict().keys() == weights.keys()


def test_gradients_reach_every_parameter_through_the_boundary_that_it_precedes() -> None:
    boundary = BoundaryVit(build_stage(meta_arch(4), StageSpan.whole(4), seed=0), stage_spans((1, 2, 1)))
    boundary(make_images())[1].square().sum().backward()  # after block 2
    with_gradient = {name.split(".")[1] for name, p in boundary.named_parameters() if name.startswith("blocks.") and p.grad is not None}
    assert with_gradient == {"0", "1", "2"}
    assert boundary.pos_embed.grad is not None and boundary.head.weight.grad is None


def test_boundaries_share_the_parameters_and_the_mode_of_the_whole_model() -> None:
    whole = build_stage(meta_arch(2), StageSpan.whole(2), seed=0).eval()
    boundary = BoundaryVit(whole, stage_spans((1, 1)))
    assert boundary.head is whole.head and not boundary.training
    with pytest.raises(ValueError, match="spans list the blocks"):
        BoundaryVit(whole, stage_spans((1, 2)))
    with pytest.raises(ValueError, match=r"this stage holds blocks 0\.\.0"):
        BoundaryVit(build_stage(meta_arch(2), StageSpan(0, 0, 2), seed=0), stage_spans((1, 1)))


@pytest.mark.parametrize(
    ("teacher", "meta", "expected"),
    [
        # Middle of each of m equal parts of t blocks: floor((j + 1/2) * t / m).
        ((6, 6), (1, 1), (3, 9)),
        ((6,), (2,), (1, 4)),
        ((6,), (3,), (1, 3, 5)),
        ((6,), (6,), (0, 1, 2, 3, 4, 5)),
        ((1, 5, 2), (1, 2, 1), (0, 2, 4, 7)),
        ((2,), (3,), (0, 1, 1)),  # deeper than the teacher: repeats
    ],
)
def test_chosen_blocks_by_hand(teacher: tuple[int, ...], meta: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert chosen_blocks(stage_spans(teacher), stage_spans(meta)) == expected


def test_a_meta_model_made_from_a_teacher_holds_its_weights() -> None:
    teacher = whole_timm(7).state_dict()
    teacher_spans, meta_spans = stage_spans((3, 4)), stage_spans((1, 2))
    weights = meta_from_teacher(teacher, teacher_spans, meta_spans)
    meta = load_stage(meta_arch(3), StageSpan.whole(3), weights)  # exact: every name used, every name filled
    for name in ("patch_embed.proj.weight", "cls_token", "pos_embed", "norm.weight", "head.bias"):
        assert torch.equal(meta.state_dict()[name], teacher[name]), name
    for number, source in ((0, 1), (1, 4), (2, 6)):
        for part in ("attn.qkv.weight", "ls1.gamma", "mlp.fc2.bias"):
            assert torch.equal(weights[f"blocks.{number}.{part}"], teacher[f"blocks.{source}.{part}"])


def test_a_meta_model_as_deep_as_the_teacher_is_the_teacher() -> None:
    model = whole_timm(7)
    spans = stage_spans((3, 4))
    meta = load_stage(TEACHER, StageSpan.whole(7), meta_from_teacher(model.state_dict(), spans, spans)).eval()
    with torch.no_grad():
        assert torch.equal(meta(make_images()), model(make_images()))


def test_the_copies_do_not_alias_the_teacher() -> None:
    teacher = whole_timm(2).state_dict()
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    for tensor in meta_from_teacher(teacher, stage_spans((2,)), stage_spans((3,))).values():
        tensor.zero_()
    assert all(torch.equal(teacher[name], before[name]) for name in before)


def test_teachers_that_do_not_fit_their_stages_are_errors() -> None:
    teacher = whole_timm(4).state_dict()
    with pytest.raises(ValueError, match="teacher has 2 stages and the meta model 1"):
        meta_from_teacher(teacher, stage_spans((2, 2)), stage_spans((1,)))
    with pytest.raises(ValueError, match=r"weights hold blocks \[0, 1, 2, 3\] and its stages blocks 0\.\.4"):
        meta_from_teacher(teacher, stage_spans((3, 2)), stage_spans((1, 1)))
    with pytest.raises(ValueError, match=r"teacher_spans list the blocks \[0, 3\]"):
        meta_from_teacher(teacher, (StageSpan(0, 0, 4), StageSpan(3, 3, 4)), stage_spans((1, 1)))

"""h_i, teacher logits and student logits against a direct, unoptimised composition of whole models (no stages, no sharing)."""

import timm
import torch
from torch import Tensor, nn

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair, stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.models.vit import VitArch, load_stage, stage_names
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch

TEACHER_DEPTHS, META_DEPTHS, STUDENT_DEPTHS = (2, 1, 2), (1, 2, 1), (1, 2, 1)
ARGS = {"patch_size": 4, "embed_dim": 24, "num_heads": 2}
PAIRS = teaching_pairs(TEACHER_DEPTHS, META_DEPTHS, STUDENT_DEPTHS)
STUDENT = VMoEArch(
    image_size=16, patch_size=8, num_classes=7, embed_dim=16, num_heads=2, mlp_ratio=2.0, num_blocks=4, moe_blocks=(0, 2, 3),
    num_experts=4, router=RouterConfig(switch_weight=0.01), backend="reference",
)  # fmt: skip


def whole_vit(depth: int, seed: int) -> nn.Module:
    """timm's own model, with weights far from their initial ones so that every part matters."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=16, num_classes=7, **ARGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stages_of(model: nn.Module, depths: tuple[int, ...]) -> list[nn.Module]:
    arch = VitArch("vit_tiny_patch16_224", {**ARGS, "depth": sum(depths)}, num_classes=7, image_size=16)
    weights = model.state_dict()
    return [load_stage(arch, span, {n: weights[n] for n in stage_names(arch, span)}).eval() for span in stage_spans(depths)]


def embed(model: nn.Module, images: Tensor) -> Tensor:
    return model._pos_embed(model.patch_embed(images))  # type: ignore[operator]


def finish(model: nn.Module, x: Tensor) -> Tensor:
    return model.head(model.norm(x)[:, 0])  # type: ignore[operator]


def direct(meta: nn.Module, other: nn.Module, pair: TeachingPair, images: Tensor, other_blocks: range) -> Tensor:
    """The hybrid written out on whole timm models: meta blocks before, `other`'s blocks, meta blocks after."""
    meta_spans = stage_spans(META_DEPTHS)
    if pair.index == 0:
        x = embed(other, images)
    else:
        x = embed(meta, images)
        for stage in range(pair.index):
            for block in meta_spans[stage].blocks:
                x = meta.blocks[block](x)  # type: ignore[index]
    for block in other_blocks:
        x = other.blocks[block](x)  # type: ignore[index]
    if pair.index == pair.count - 1:
        return finish(other, x)
    for stage in range(pair.index + 1, pair.count):
        for block in meta_spans[stage].blocks:
            x = meta.blocks[block](x)  # type: ignore[index]
    return finish(meta, x)


def student_of(pair: TeachingPair) -> VisionMoE:
    stitches = stitch_specs(pair, teacher_width=24, student_width=16)
    return VisionMoE(STUDENT, pair.student, stitches=stitches, seed=3)


def test_hidden_states_and_teacher_logits_equal_the_direct_composition() -> None:
    meta_model, teacher_model = whole_vit(4, seed=0), whole_vit(5, seed=1)
    meta = FrozenMeta(dict(enumerate(stages_of(meta_model, META_DEPTHS))))
    teachers = [freeze(stage) for stage in stages_of(teacher_model, TEACHER_DEPTHS)]
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    hidden = meta.hidden_states(images, PAIRS)
    assert torch.equal(hidden[0], images)
    with torch.no_grad():
        for pair in PAIRS:
            expected = direct(meta_model, teacher_model, pair, images, pair.teacher.blocks)
            got = teacher_logits(meta, pair, teachers[pair.index], hidden[pair.index])
            assert torch.equal(got, expected), f"pair {pair.index}"


def test_teacher_module_inside_its_own_teacher_is_the_teacher() -> None:
    # T as its own meta model: every hybrid must then be T itself
    teacher_model = whole_vit(4, seed=5)
    stages = stages_of(teacher_model, META_DEPTHS)
    meta = FrozenMeta(dict(enumerate(stages)))
    pairs = teaching_pairs(META_DEPTHS, META_DEPTHS, STUDENT_DEPTHS)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        whole = teacher_model(images)
        hidden = meta.hidden_states(images, pairs)
        for pair in pairs:
            assert torch.equal(teacher_logits(meta, pair, stages[pair.index], hidden[pair.index]), whole)


def test_student_logits_and_gradients_equal_the_direct_composition() -> None:
    meta_model = whole_vit(4, seed=0)
    meta = FrozenMeta(dict(enumerate(stages_of(meta_model, META_DEPTHS))))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    for pair in PAIRS:
        student, twin = student_of(pair), student_of(pair)
        logits = meta.suffix(pair, student(meta.hidden_states(images, [pair])[pair.index]).output)
        logits.square().sum().backward()

        # the same, written out: no FrozenMeta, no spans
        if pair.index == 0:
            x = images
        else:
            x = embed(meta_model, images)
            for stage in range(pair.index):
                for block in stage_spans(META_DEPTHS)[stage].blocks:
                    x = meta_model.blocks[block](x)  # type: ignore[index]
        y = twin(x).output
        if pair.index < 2:
            for stage in range(pair.index + 1, 3):
                for block in stage_spans(META_DEPTHS)[stage].blocks:
                    y = meta_model.blocks[block](y)  # type: ignore[index]
            y = finish(meta_model, y)
        y.square().sum().backward()
        assert torch.equal(logits, y)
        for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
            assert ours.grad is not None and torch.equal(ours.grad, theirs.grad), name


def test_prefix_teacher_and_suffix_hold_no_gradient_and_the_student_gets_all() -> None:
    meta = FrozenMeta(dict(enumerate(stages_of(whole_vit(4, seed=0), META_DEPTHS))))
    teachers = [freeze(stage) for stage in stages_of(whole_vit(5, seed=1), TEACHER_DEPTHS)]
    images = torch.randn(8, 3, 16, 16)
    hidden = meta.hidden_states(images, PAIRS)
    for pair in PAIRS:
        student = student_of(pair)
        taught = teacher_logits(meta, pair, teachers[pair.index], hidden[pair.index])
        assert not taught.requires_grad and not hidden[pair.index].requires_grad
        output = student(hidden[pair.index])
        logits = meta.suffix(pair, output.output)
        (logits.log_softmax(-1)[:, 0].sum() + sum(output.router_losses.values())).backward()
        without = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().any()]
        # A key bias only shifts all scores of a query alike, so its exact gradient is zero; it is part of the fused qkv bias.
        # Experts that got no token have no gradient either, by their own rows; as stacked tensors they always have some.
        assert without == []
    for module in (*meta.stages.values(), *teachers):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_only_needed_meta_stages_are_asked_for() -> None:
    assert FrozenMeta.needed_stages([PAIRS[0]]) == {1, 2}
    assert FrozenMeta.needed_stages([PAIRS[1]]) == {0, 2}
    assert FrozenMeta.needed_stages([PAIRS[2]]) == {0, 1}
    assert FrozenMeta.needed_stages(PAIRS) == {0, 1, 2}


def test_the_prefix_chain_runs_once_for_all_pairs() -> None:
    calls: list[int] = []

    class Counting(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.number)
            return x + 1

    meta = FrozenMeta({i: Counting(i) for i in range(3)})
    meta.hidden_states(torch.zeros(1), PAIRS)
    assert calls == [0, 1]  # stage 2 stands behind every pair's input

"""Parameters and floating-point operations of a phase (planner/flops.py counts those of its parts)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from m2mkd_ds.config import PAIR_PHASES, RunConfig
from m2mkd_ds.distill.pairs import TeachingPair, stage_spans, stitch_specs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch
from m2mkd_ds.models.vmoe import StitchSpec, arch_from_config
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.planner.flops import Flops, experts_a_token, student_flops, vit_stage_flops, vit_stage_tokens
from m2mkd_ds.planner.scenes import SceneSettings, all_pairs, frozen_modules, teacher_width, trained_modules, vit_stages


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters of a phase, all pairs that are in its job."""

    trained: int
    active: int
    """Of the trained ones, those that one token uses."""
    dense: int
    experts: int
    stitches: int
    """dense + experts + stitches = trained."""
    frozen_teacher: int
    frozen_meta: int

    @property
    def total(self) -> int:
        """In a trainer's memory."""
        return self.trained + self.frozen_teacher + self.frozen_meta


def count(config: RunConfig, phase: str, settings: SceneSettings) -> Parameters:
    """Parameters of a phase."""
    trained = experts = stitches = 0
    for module in trained_modules(config, phase, settings.pairs).values():
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        trained += sum(sizes.values())
        stitches += sum(n for name, n in sizes.items() if name.startswith("stitches."))
        experts += sum(p.numel() for layer in module.modules() if isinstance(layer, Experts) for p in layer.parameters())
    frozen = {name: sum(p.numel() for p in stage.parameters()) for name, stage in frozen_modules(config, phase, settings).items()}
    arch = arch_from_config(config)
    return Parameters(
        trained=trained, active=trained - experts + round(experts * experts_a_token(arch) / arch.num_experts),
        dense=trained - experts - stitches, experts=experts, stitches=stitches,
        frozen_teacher=sum(n for name, n in frozen.items() if name.startswith("teacher")),
        frozen_meta=sum(n for name, n in frozen.items() if name.startswith("meta")),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorkOfImage:
    """FLOPs of one image in a trainer. Experts compute the rows that were routed to them and no padding, so all of it is useful."""

    frozen: float
    """Forward passes without a gradient: prefix, teacher modules and their suffix."""
    forward: float
    """Of what is trained, and of the frozen stages behind it."""
    backward: float

    @property
    def total(self) -> float:
        return self.frozen + self.forward + self.backward


def work_of_image(config: RunConfig, phase: str, settings: SceneSettings) -> WorkOfImage:
    """FLOPs of one image. Raises ValueError for a teacher whose FLOPs are not known."""
    teacher, meta = VitArch.from_teacher(config), VitArch.from_meta(config)
    if phase in PAIR_PHASES:
        return _of_pairs(config, phase, settings)
    if phase in ("pretrain_meta", "assemble_finetune"):
        arch, depths = (meta, config.meta.depths) if phase == "pretrain_meta" else (teacher, config.teacher.depths)
        (whole,) = vit_stages(arch, [StageSpan.whole(sum(depths))])
        tokens = vit_stage_tokens(whole)
        flops = vit_stage_flops(whole, tokens)
        follows = [stage for name, stage in frozen_modules(config, phase, settings).items() if name.startswith("teacher")][:-1]
        return WorkOfImage(
            frozen=sum(vit_stage_flops(stage, tokens).forward for stage in follows), forward=flops.forward, backward=flops.full_backward
        )
    arch_student = arch_from_config(config)
    kept = phase == "end_to_end" and config.student.keep_stitches
    width = teacher_width(config)
    stitches = [spec for pair in all_pairs(config) for spec in _stitches(pair, width, arch_student.embed_dim)] if kept else []
    flops = student_flops(arch_student, StageSpan.whole(arch_student.num_blocks), stitches, arch_student.num_tokens)
    return WorkOfImage(frozen=0.0, forward=flops.forward, backward=flops.full_backward)


def _of_pairs(config: RunConfig, phase: str, settings: SceneSettings) -> WorkOfImage:
    pairs = [pair for pair in all_pairs(config) if not settings.pairs or pair.index in settings.pairs]
    stages = vit_stages(VitArch.from_meta(config), stage_spans(config.meta.depths))
    teachers = vit_stages(VitArch.from_teacher(config), [pair.teacher for pair in pairs])
    modules = {pair.index: module for pair, module in zip(pairs, teachers, strict=True)}
    tokens, width = vit_stage_tokens(stages[0]), int(stages[0].embed_dim)
    frozen = sum(vit_stage_flops(stages[i], tokens).forward for i in pairs[-1].prefix_stages)
    forward = backward = 0.0
    arch = arch_from_config(config)
    for pair in pairs:
        own_tokens = arch.num_tokens if pair.is_first and phase == "m2mkd" else tokens
        behind = _sum(vit_stage_flops(stages[i], own_tokens) for i in pair.suffix_stages)
        if phase == "m2mkd":
            flops = student_flops(arch, pair.student, _stitches(pair, width, arch.embed_dim), own_tokens)
            if settings.with_teacher and config.distill.kd_weight > 0:
                frozen += vit_stage_flops(modules[pair.index], tokens).forward
                frozen += sum(vit_stage_flops(stages[i], tokens).forward for i in pair.suffix_stages)
        else:
            flops = vit_stage_flops(modules[pair.index], tokens)
        forward += flops.forward + behind.forward
        backward += flops.full_backward + behind.input_backward
    return WorkOfImage(frozen=frozen, forward=forward, backward=backward)


def _sum(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops())


def _stitches(pair: TeachingPair, width: int, student_width: int) -> Sequence[StitchSpec]:
    return stitch_specs(pair, teacher_width=width, student_width=student_width)

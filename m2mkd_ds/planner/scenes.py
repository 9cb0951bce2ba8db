"""The phases as scenes: the real modules on the meta device, the batch that the feed makes, and the losses that the steps compute.

    pretrain_meta       the meta model, on labels; for a pretrained teacher it also follows the teacher's hidden states
    modular_train       teacher module i, frozen meta suffix behind it            assemble_finetune   the whole teacher
    m2mkd               student module i, frozen meta suffix, teacher logits       end_to_end, baseline   the whole student

Shape letters: B images, L tokens, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.config import PAIR_PHASES, PhaseConfig, RunConfig
from m2mkd_ds.distill.pairs import TeachingPair, stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.models.meta import BoundaryVit, run_stages
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch, meta_device_model
from m2mkd_ds.models.vit import VitStage
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, VMoEOutput, arch_from_config
from m2mkd_ds.planner.shapes_of_experts import prepare_experts_
from m2mkd_ds.planner.step_trace import Scene, TraineeScene

STUDENT_PHASES = ("m2mkd", "end_to_end", "baseline")
"""Phases that train experts."""


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """How a scene is set."""

    dtype: torch.dtype
    backend: str
    """Of the experts: `fused` or `loop`, which run on the meta device; `loop` keeps what `grouped` keeps."""
    ep_size: int = 1
    imbalance: float = 1.0
    """Rows of the busiest expert over the mean."""
    arriving: float = 0.0
    """Of spread experts: rows that the fullest rank computes over those that it sends; 0: as follows from `imbalance`."""
    pairs: tuple[int, ...] = ()
    """Teaching pairs in the job; empty: all."""
    with_teacher: bool = True
    """Whether teacher modules and prefix run in the trainer (teacher.feed=colocated)."""


@dataclass(frozen=True)
class Batch:
    """What a feed gives, on the meta device."""

    hidden: Mapping[int, Tensor]
    teacher_logits: Mapping[int, Tensor]
    targets_BV: Tensor


def phase_config(config: RunConfig, phase: str) -> PhaseConfig:
    """The branch that holds a phase's settings; the baseline trains with those of end_to_end."""
    found: PhaseConfig = getattr(config, "end_to_end" if phase == "baseline" else phase)
    return found


def make_scene(config: RunConfig, phase: str, settings: SceneSettings) -> Scene:
    """The scene of a phase. Raises ValueError when ep_size does not divide the experts."""
    return _pair_scene(config, phase, settings) if phase in PAIR_PHASES else _whole_scene(config, phase, settings)


def trained_modules(config: RunConfig, phase: str, pairs: Sequence[int] = ()) -> dict[int, nn.Module]:
    """What a phase trains, by pair (a whole model: 0), fp32 on the meta device."""
    rate = phase_config(config, phase).drop_path
    if phase == "pretrain_meta":
        spans = stage_spans(config.meta.depths)
        (whole,) = vit_stages(VitArch.from_meta(config), [StageSpan.whole(spans[0].num_blocks)], drop_path=rate)
        return {0: whole if config.teacher.source == "incubate" else BoundaryVit(whole, spans)}
    if phase == "assemble_finetune":
        return {0: vit_stages(VitArch.from_teacher(config), [StageSpan.whole(sum(config.teacher.depths))], drop_path=rate)[0]}
    chosen = [pair for pair in all_pairs(config) if not pairs or pair.index in pairs]
    if phase == "modular_train":
        stages = vit_stages(VitArch.from_teacher(config), [pair.teacher for pair in chosen], drop_path=rate)
        return {pair.index: stage for pair, stage in zip(chosen, stages, strict=True)}
    arch, width = arch_from_config(config), teacher_width(config)
    if phase == "m2mkd":
        return {pair.index: VisionMoE(arch, pair.student, stitches=_stitches(pair, width, arch.embed_dim), drop_path=rate, seed=None)
                for pair in chosen}  # fmt: skip
    kept = phase == "end_to_end" and config.student.keep_stitches
    stitches = [spec for pair in all_pairs(config) for spec in _stitches(pair, width, arch.embed_dim)] if kept else []
    return {0: VisionMoE(arch, StageSpan.whole(arch.num_blocks), stitches=stitches, drop_path=rate, seed=None)}


def all_pairs(config: RunConfig) -> tuple[TeachingPair, ...]:
    """The teaching pairs of a run."""
    return teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)


def frozen_modules(config: RunConfig, phase: str, settings: SceneSettings) -> dict[str, VitStage]:
    """What a trainer holds without training it: the meta stages around its pairs, and the teacher modules where it runs them itself."""
    pairs = [pair for pair in all_pairs(config) if not settings.pairs or pair.index in settings.pairs]
    found: dict[str, VitStage] = {}
    if phase in PAIR_PHASES:
        needed = sorted({stage for pair in pairs for stage in (*pair.prefix_stages, *pair.suffix_stages)})
        spans = stage_spans(config.meta.depths)
        stages = vit_stages(VitArch.from_meta(config), [spans[i] for i in needed])
        found |= {f"meta {i}": stage for i, stage in zip(needed, stages, strict=True)}
    if _runs_teacher(config, phase, settings):
        held = pairs if phase == "m2mkd" else all_pairs(config)
        modules = vit_stages(VitArch.from_teacher(config), [pair.teacher for pair in held])
        found |= {f"teacher {pair.index}": module for pair, module in zip(held, modules, strict=True)}
    return found


def vit_stages(arch: VitArch, spans: Sequence[StageSpan], *, drop_path: float = 0.0) -> list[VitStage]:
    """Stages of one model on the meta device; the model is built once."""
    whole = meta_device_model(arch, drop_path=drop_path)
    return [VitStage(whole, span) for span in spans]


def _runs_teacher(config: RunConfig, phase: str, settings: SceneSettings) -> bool:
    follows = phase == "pretrain_meta" and config.teacher.source == "pretrained"
    return follows or (phase == "m2mkd" and settings.with_teacher and config.distill.kd_weight > 0)


def teacher_width(config: RunConfig) -> int:
    """Width of teacher and meta model."""
    return int(meta_device_model(VitArch.from_meta(config)).embed_dim)


def _stitches(pair: TeachingPair, teacher_width: int, student_width: int) -> tuple[StitchSpec, ...]:
    return stitch_specs(pair, teacher_width=teacher_width, student_width=student_width)


def _ready(module: nn.Module, settings: SceneSettings) -> nn.Module:
    prepare_experts_(module, settings.backend, settings.ep_size, settings.imbalance, settings.arriving)
    return module.to(settings.dtype).train()


def _frozen(config: RunConfig, phase: str, settings: SceneSettings) -> dict[str, nn.Module]:
    modules = frozen_modules(config, phase, settings)
    return {name: module.to(settings.dtype).eval().requires_grad_(False) for name, module in modules.items()}


def _images(config: RunConfig, settings: SceneSettings, b: int) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, S, S] in the precision of the run, targets [B, V] in fp32."""
    size = config.data.image_size
    pixels_BCHW = torch.empty(b, 3, size, size, dtype=settings.dtype, device="meta")
    return pixels_BCHW, torch.empty(b, config.data.num_classes, dtype=torch.float32, device="meta")


def _task(logits_BV: Tensor, targets_BV: Tensor) -> Tensor:
    return -(targets_BV * F.log_softmax(logits_BV.float(), dim=-1)).sum(dim=-1).mean()


def _unpack(output: object) -> tuple[Tensor, list[Tensor]]:
    """Logits or hidden states, and the router's losses."""
    if isinstance(output, VMoEOutput):
        return output.output, [loss.float() for loss in output.router_losses.values()]
    assert isinstance(output, (Tensor, list))
    return (output[-1] if isinstance(output, list) else output), []


def _pair_scene(config: RunConfig, phase: str, settings: SceneSettings) -> Scene:
    frozen = _frozen(config, phase, settings)
    pairs = {pair.index: pair for pair in all_pairs(config) if not settings.pairs or pair.index in settings.pairs}
    modules = trained_modules(config, phase, settings.pairs)
    taught = _runs_teacher(config, phase, settings)
    temperature = config.distill.temperature

    def suffix(pair: TeachingPair, x: Tensor) -> Tensor:
        for stage in pair.suffix_stages:
            x = frozen[f"meta {stage}"](x)
        return x

    @torch.no_grad()
    def make_batch(images: int) -> Batch:
        x, targets_BV = _images(config, settings, images)
        hidden: dict[int, Tensor] = {}
        for stage in range(max(pairs) + 1):
            if stage in pairs:
                hidden[stage] = x
            if stage < max(pairs):
                x = frozen[f"meta {stage}"](x)
        logits = {i: suffix(pair, frozen[f"teacher {i}"](hidden[i])) for i, pair in pairs.items()} if taught else {}
        return Batch(hidden, logits, targets_BV)

    def loss_of(pair: TeachingPair, module: nn.Module, batch: Batch) -> Tensor:
        output, router_losses = _unpack(module(batch.hidden[pair.index]))
        logits_BV = suffix(pair, output)
        loss = _task(logits_BV, batch.targets_BV)
        if taught:
            log_student_BV, log_teacher_BV = (
                F.log_softmax(logits.float() / temperature, dim=-1) for logits in (logits_BV, batch.teacher_logits[pair.index])
            )
            loss = loss + F.kl_div(log_student_BV, log_teacher_BV, reduction="sum", log_target=True)
        return torch.stack([loss, *router_losses]).sum()

    ready = {i: _ready(module, settings) for i, module in modules.items()}
    trainees = tuple(TraineeScene(f"pair {i}", module, partial(loss_of, pairs[i], module)) for i, module in ready.items())
    return Scene(trainees, tuple(frozen.values()), make_batch)


def _whole_scene(config: RunConfig, phase: str, settings: SceneSettings) -> Scene:
    module = _ready(trained_modules(config, phase)[0], settings)
    teachers = tuple(_frozen(config, phase, settings).values())

    def make_batch(images: int) -> Batch:
        pixels_BCHW, targets_BV = _images(config, settings, images)
        return Batch({0: pixels_BCHW}, {}, targets_BV)

    def loss(batch: Batch) -> Tensor:
        output = module(batch.hidden[0])
        logits_BV, router_losses = _unpack(output)
        total = torch.stack([_task(logits_BV, batch.targets_BV), *router_losses]).sum()
        return total + _distance(output[:-1], teachers, batch.hidden[0]) if teachers else total

    return Scene((TraineeScene(phase, module, loss),), teachers, make_batch)


def _distance(meta_states: Sequence[Tensor], teachers: Sequence[nn.Module], pixels_BCHW: Tensor) -> Tensor:
    """Of the meta model's hidden states from the teacher's, as in the aligned step."""
    with torch.no_grad():
        states = run_stages(teachers[:-1], pixels_BCHW)
    distances = [F.mse_loss(meta.float(), target.float()) / target.float().var() for meta, target in zip(meta_states, states, strict=True)]
    return torch.stack(distances).mean() if distances else pixels_BCHW.new_zeros((), dtype=torch.float32)

"""One try of `m2mkd probe-batch`, in a process of its own: a phase's real step with fresh weights on made-up images, and its peak.

The modules, their engine (DeepSpeed, optimizer, moving average) and the step functions are those of training; the job has one rank.
Only weights and images are made up: neither changes what a step needs. Two optimizer steps, because the optimizer's moments exist only
after the first. Shape letters: B images, S their side, V classes.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.out_of_memory import ran_out_of_memory
from m2mkd_ds.config import PAIR_PHASES, DistillConfig, PhaseConfig, RunConfig, load
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.distill.assemble import pair_stitches
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair, parse_pairs, stitch_specs, teaching_pairs
from m2mkd_ds.distributed.world import World, init_world
from m2mkd_ds.models.meta import BoundaryVit
from m2mkd_ds.models.spans import StageSpan, stage_spans
from m2mkd_ds.models.vit import VitArch, build_stage, num_blocks, width
from m2mkd_ds.models.vmoe import VisionMoE, arch_from_config
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.job import Trainee
from m2mkd_ds.train.phases.jobs import StepFunction, make_trainee
from m2mkd_ds.train.phases.prepare import LABELS_ONLY, supervised
from m2mkd_ds.train.steps import aligned_step, pair_step

STEPS = 2
MOST_MICRO_STEPS = 2
"""Micro-batches of a step that are run: gradients are accumulated from the second one on, and further ones change nothing."""


@dataclass(frozen=True)
class Scene:
    """What a rank of the phase holds."""

    trainees: list[Trainee]
    make_batch: Callable[[], TeacherBatch]


def owner_of(name: str) -> str:
    """The config branch whose micro-batch a phase uses."""
    return "end_to_end" if name == "baseline" else name


def run_steps(config: RunConfig, name: str, world: World, pairs: str = "all") -> None:
    """Two optimizer steps of phase `name` at its configured micro-batch. Raises ValueError for what the phase cannot do."""
    phase: PhaseConfig = getattr(config, owner_of(name))
    # One rank holds all experts, and as many micro-batches as make a difference.
    phase = replace(phase, ep_size=1, gradient_accumulation_steps=min(phase.gradient_accumulation_steps, MOST_MICRO_STEPS))
    ctx = _context(config, world)
    chosen = tuple(ctx.pairs[i] for i in parse_pairs(pairs, len(ctx.pairs)))
    scene = _pair_scene(ctx, name, phase, chosen) if name in PAIR_PHASES else _whole_scene(ctx, name, phase)
    for _ in range(STEPS):
        for _ in range(phase.gradient_accumulation_steps):  # the order of train.loop
            batch = scene.make_batch()
            for trainee in scene.trainees:
                trainee.engine.backward(trainee.step_fn(batch, False).loss)
            for trainee in scene.trainees:
                trainee.engine.step(phase.min_lr)
    for trainee in scene.trainees:
        trainee.engine.close()


def _context(config: RunConfig, world: World) -> RunContext:
    """As `open_run` makes it, without data: nothing here asks for them."""
    nothing = cast(ShardIndex, None)
    teacher = VitArch.from_teacher(config)
    return RunContext(
        config=config, root=Path(config.run_dir or "."), world=world, train_index=nothing, val_index=nothing, teacher_arch=teacher,
        meta_arch=VitArch.from_meta(config), student_arch=arch_from_config(config),
        pairs=teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths), teacher_width=width(teacher), images=False,
    )  # fmt: skip


def _whole_scene(ctx: RunContext, name: str, phase: PhaseConfig) -> Scene:
    module, step = _whole_model(ctx, name, phase)
    trainee = make_trainee(ctx, phase, module, step, name=name, pair=0, folder=ctx.root, print_="")

    def make_batch() -> TeacherBatch:
        images_BCHW, targets_BV = _images(ctx, phase)
        return TeacherBatch({0: images_BCHW}, {}, targets_BV, torch.arange(len(images_BCHW)))

    return Scene([trainee], make_batch)


def _whole_model(ctx: RunContext, name: str, phase: PhaseConfig) -> tuple[nn.Module, StepFunction]:
    config, dtype = ctx.config, ctx.dtype(phase.precision)
    if name in ("end_to_end", "baseline"):
        arch, keep = ctx.student_arch, name == "end_to_end" and config.student.keep_stitches
        stitches = pair_stitches(ctx.pairs, arch, ctx.teacher_width) if keep else ()
        return VisionMoE(arch, StageSpan.whole(arch.num_blocks), stitches=stitches, drop_path=phase.drop_path, seed=config.seed), supervised
    arch_of = ctx.meta_arch if name == "pretrain_meta" else ctx.teacher_arch
    module = build_stage(arch_of, StageSpan.whole(num_blocks(arch_of)), seed=config.seed, drop_path=phase.drop_path)
    if name == "assemble_finetune" or config.teacher.source == "incubate":
        return module, supervised
    teacher: list[nn.Module] = [freeze(ctx.place(build_stage(ctx.teacher_arch, p.teacher, seed=config.seed), dtype)) for p in ctx.pairs]
    weight = config.meta.align_weight
    return (
        BoundaryVit(module, stage_spans(config.meta.depths)),
        lambda engine, batch, log: aligned_step(engine, teacher, batch, weight, log=log),
    )


def _pair_scene(ctx: RunContext, name: str, phase: PhaseConfig, pairs: tuple[TeachingPair, ...]) -> Scene:
    config, dtype = ctx.config, ctx.dtype(phase.precision)
    spans = stage_spans(config.meta.depths)
    needed = sorted(FrozenMeta.needed_stages(pairs))
    meta = FrozenMeta({i: ctx.place(build_stage(ctx.meta_arch, spans[i], seed=config.seed), dtype) for i in needed})
    loss: DistillConfig = config.distill if name == "m2mkd" else LABELS_ONLY
    teachers: Mapping[int, nn.Module] = {}
    # With a teacher elsewhere, its outputs are numbers that arrive; the same goes for stored ones.
    if loss.kd_weight and config.teacher.feed == "colocated":
        teachers = {p.index: freeze(ctx.place(build_stage(ctx.teacher_arch, p.teacher, seed=config.seed), dtype)) for p in pairs}

    def step_of(pair: TeachingPair) -> StepFunction:
        return lambda engine, batch, log: pair_step(engine, pair, meta, batch, loss, log=log)

    trainees = [
        make_trainee(
            ctx, phase, _pair_module(ctx, name, phase, pair), step_of(pair), name=f"{name} pair {pair.index}", pair=pair.index,
            folder=ctx.root, print_="",
        )
        for pair in pairs
    ]  # fmt: skip

    def make_batch() -> TeacherBatch:
        images_BCHW, targets_BV = _images(ctx, phase)
        hidden = meta.hidden_states(images_BCHW, pairs)
        taught = {p.index: teacher_logits(meta, p, teachers[p.index], hidden[p.index]) for p in pairs if p.index in teachers}
        if loss.kd_weight and not teachers:
            taught = {p.index: torch.randn_like(targets_BV) for p in pairs}
        return TeacherBatch(hidden, taught, targets_BV, torch.arange(len(images_BCHW)))

    return Scene(trainees, make_batch)


def _pair_module(ctx: RunContext, name: str, phase: PhaseConfig, pair: TeachingPair) -> nn.Module:
    seed = ctx.config.seed
    if name == "modular_train":
        return build_stage(ctx.teacher_arch, pair.teacher, seed=seed, drop_path=phase.drop_path)
    stitches = stitch_specs(pair, teacher_width=ctx.teacher_width, student_width=ctx.student_arch.embed_dim)
    return VisionMoE(ctx.student_arch, pair.student, stitches=stitches, drop_path=phase.drop_path, seed=seed)


def _images(ctx: RunContext, phase: PhaseConfig) -> tuple[Tensor, Tensor]:
    """Noise [B, 3, S, S] in the precision of the run and random classes [B, V], on the rank's device."""
    data, device = ctx.config.data, ctx.world.device
    images_BCHW = torch.randn(phase.micro_batch_size, 3, data.image_size, data.image_size, device=device)
    labels_B = torch.randint(data.num_classes, (phase.micro_batch_size,), device=device)
    return images_BCHW.to(ctx.dtype(phase.precision)), nn.functional.one_hot(labels_B, data.num_classes).float()


def peak_bytes(device: torch.device) -> int:
    """The largest amount of memory so far: what torch took from a GPU, else the resident set of this program."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _main(config_file: str, name: str, pairs: str, limit: str) -> None:
    """Print one line of JSON: {"peak": bytes, "limit": bytes} or {"out_of_memory": what the allocator said, "limit": bytes}."""
    world = init_world()
    bound = int(limit)
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        bound = min(bound or free, free)
        torch.cuda.set_per_process_memory_fraction(bound / total, world.device)
    answer: dict[str, Any] = {"limit": bound}
    try:
        run_steps(load(config_file), name, world, pairs)
        answer["peak"] = peak_bytes(world.device)
    except RuntimeError as err:
        if not ran_out_of_memory(err):
            raise
        answer["out_of_memory"] = str(err).splitlines()[0]
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the answer is out: what leaving the job takes is no part of a step, and nobody waits for this rank


if __name__ == "__main__":
    _main(*sys.argv[1:])

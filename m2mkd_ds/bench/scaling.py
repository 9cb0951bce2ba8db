"""`m2mkd bench scaling` on the ranks of one job: the real training step, engine and collectives included, on synthetic images.

    m2mkd        frozen prefix, teacher modules and suffix; then every pair: forward, suffix, loss, backward; then every pair's update
    end_to_end   the whole student: forward, loss, backward, update

Losses, optimizer and engine are the trainer's own (train.steps, train.optim, distributed.engine). There is no loader, no evaluation and
no checkpoint. Every rank has images of its own and as many of them whatever the number of ranks.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.bench.collective_time import CollectiveTime
from m2mkd_ds.bench.scaling_options import Layout, ScalingBench, Workload
from m2mkd_ds.config import (
    DataConfig,
    DistillConfig,
    MetaConfig,
    MoEConfig,
    PhaseConfig,
    RouterConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair, stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.expert_parallel import shard_experts_
from m2mkd_ds.distributed.world import World, all_reduce_sum, barrier, gather_object
from m2mkd_ds.logs import Progress
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch
from m2mkd_ds.models.vit import build_stage
from m2mkd_ds.models.vmoe import VisionMoE, arch_from_config
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.train.optim import build_adamw
from m2mkd_ds.train.steps import pair_step, supervised_step

IMAGE_SIZE, PATCH, CLASSES = 64, 8, 100


@dataclass(frozen=True)
class Measured:
    """One workload and layout in one job, before it is compared; JSON of the job's rank 0."""

    workload: Workload
    layout: Layout
    ranks: int
    ep_size: int
    step_s: list[float]
    """Of the slowest rank, step by step."""
    collective_s: list[list[float]]
    """By rank, step by step: seconds inside collectives."""
    collective_calls: int
    """Of rank 0 in one step."""
    collective_bytes: int
    """Handed to collectives by rank 0 in one step."""
    unmeasured: int
    """Asynchronous calls, whose time is not in collective_s."""
    parameters: int
    """Trained by the job."""
    loss: float
    """Of rank 0's last step: a number that is not finite would make the times worthless."""
    threads: int
    cores: int


def measure_job(options: ScalingBench, world: World, clock: CollectiveTime) -> list[Measured]:
    """All workloads and layouts with this job's ranks. Collective. Raises RuntimeError when a loss is not finite."""
    options = options.resolved()
    found = []
    chosen = [(w, x) for w in options.workloads for x in options.layouts if x != "zero2_ep" or _can_spread(options, world)]
    with Progress(len(chosen), f"{world.size} rank(s)", enabled=world.is_main) as bar:
        for workload, layout in chosen:
            found.append(_measure(options, world, clock, workload, layout))
            bar.advance(note=f"{workload} {layout}")
    return found


def _can_spread(options: ScalingBench, world: World) -> bool:
    """One rank has nobody to spread experts over."""
    return world.size > 1 and options.experts % world.size == 0


def _measure(options: ScalingBench, world: World, clock: CollectiveTime, workload: Workload, layout: Layout) -> Measured:
    job = _Job(options, world, workload, layout)
    times: list[float] = []
    inside: list[float] = []
    loss = 0.0
    barrier()
    for number in range(options.warm_up + options.steps):
        clock.take()
        began = time.perf_counter()
        loss = job.step()
        took, taken = time.perf_counter() - began, clock.take()
        if number >= options.warm_up:
            times.append(took)
            inside.append(taken.seconds)
    parameters, ep_size = job.parameters, job.ep_size
    job.close()
    del job
    gc.collect()
    all_times, all_inside = zip(*gather_object((times, inside)), strict=True)
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise RuntimeError(f"{workload}, {layout}: the loss became {loss}; the times of such a run mean nothing")
    return Measured(
        workload=workload, layout=layout, ranks=world.size, ep_size=ep_size, step_s=[max(step) for step in zip(*all_times, strict=True)],
        collective_s=list(all_inside), collective_calls=taken.calls, collective_bytes=taken.num_bytes, unmeasured=taken.unmeasured,
        parameters=parameters, loss=loss, threads=torch.get_num_threads(), cores=len(os.sched_getaffinity(0)),
    )  # fmt: skip


def _config(options: ScalingBench) -> RunConfig:
    """Teacher and student of two modules."""
    depths = (options.blocks,) * 2
    width = options.dim // 2
    return RunConfig(
        name="scaling", data=DataConfig(num_classes=CLASSES, image_size=IMAGE_SIZE), meta=MetaConfig(depths=(1, 1)),
        teacher=TeacherConfig(
            arch="vit_tiny_patch16_224", depths=depths,
            arch_args={"patch_size": PATCH, "embed_dim": width, "depth": sum(depths), "num_heads": width // 32},
        ),
        student=StudentConfig(
            embed_dim=options.dim, num_heads=options.dim // 32, patch_size=PATCH, depths=depths,
            moe=MoEConfig(num_experts=options.experts, router=RouterConfig(top_k=min(2, options.experts))),
        ),
    )  # fmt: skip


class _Job:
    """The modules, engines and images of one rank."""

    def __init__(self, options: ScalingBench, world: World, workload: Workload, layout: Layout) -> None:
        self.world, self.options = world, options
        self.ep_size = world.size if layout == "zero2_ep" else 1
        config = _config(options)
        self.phase = PhaseConfig(micro_batch_size=options.micro_batch, lr=1e-4, lr_batch=0, clip_grad=1.0, precision="fp32")
        self.settings = resolve_ds_config(layout.removesuffix("_ep"), self.phase, world_size=world.size, precision="fp32")
        generator = torch.Generator().manual_seed(world.rank)
        self.pixels_BCHW = torch.randn(options.micro_batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        labels_B = torch.randint(CLASSES, (options.micro_batch,), generator=generator)
        self.targets_BV = nn.functional.one_hot(labels_B, CLASSES).float()
        self.engines: list[DeepSpeedEngine] = []
        self._steps: list[Callable[[TeacherBatch], Tensor]] = []
        make = self._make_pairs if workload == "m2mkd" else self._make_whole
        self._batch = make(config)
        self.parameters = sum(_whole_numel(engine.module, self.ep_size) for engine in self.engines)

    def step(self) -> float:
        """One optimizer step, as the training loop makes it; the loss (the sum over pairs)."""
        batch = self._batch()
        losses = []
        for engine, forward in zip(self.engines, self._steps, strict=True):
            loss = forward(batch)
            engine.backward(loss)
            losses.append(loss.detach())
        # The ranks agree that all losses are finite before any weight changes.
        all_reduce_sum((~torch.isfinite(torch.stack(losses))).sum())
        for engine in self.engines:
            engine.step(self.phase.lr)
        return float(torch.stack(losses).sum())

    def close(self) -> None:
        """Let go of engines and modules."""
        for engine in self.engines:
            engine.close()

    def _engine(self, module: nn.Module) -> DeepSpeedEngine:
        if self.ep_size > 1:
            shard_experts_(module, self.world, self.ep_size)
        engine = DeepSpeedEngine(module.train(), build_adamw(module, self.phase), self.settings, self.world)
        self.engines.append(engine)
        return engine

    def _make_pairs(self, config: RunConfig) -> Callable[[], TeacherBatch]:
        pairs = teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)
        teacher_arch, meta_arch, student_arch = VitArch.from_teacher(config), VitArch.from_meta(config), arch_from_config(config)
        spans = stage_spans(config.meta.depths)
        meta = FrozenMeta({i: build_stage(meta_arch, spans[i], seed=1) for i in FrozenMeta.needed_stages(pairs)})
        teachers = {pair.index: freeze(build_stage(teacher_arch, pair.teacher, seed=2)) for pair in pairs}
        for pair in pairs:
            stitches = stitch_specs(pair, teacher_width=self.options.dim // 2, student_width=self.options.dim)
            engine = self._engine(VisionMoE(student_arch, pair.student, stitches=stitches, seed=0))
            self._steps.append(_pair_loss(engine, pair, meta))

        def batch() -> TeacherBatch:
            hidden = meta.hidden_states(self.pixels_BCHW, pairs)
            logits = {pair.index: teacher_logits(meta, pair, teachers[pair.index], hidden[pair.index]) for pair in pairs}
            return self._with_targets(hidden, logits)

        return batch

    def _make_whole(self, config: RunConfig) -> Callable[[], TeacherBatch]:
        arch = arch_from_config(config)
        engine = self._engine(VisionMoE(arch, StageSpan.whole(arch.num_blocks), seed=0))
        self._steps.append(lambda batch: supervised_step(engine, batch, log=False).loss)
        return lambda: self._with_targets({0: self.pixels_BCHW}, {})

    def _with_targets(self, hidden: dict[int, Tensor], logits: dict[int, Tensor]) -> TeacherBatch:
        slots_B = torch.arange(self.options.micro_batch)
        return TeacherBatch(hidden=hidden, teacher_logits=logits, targets_BV=self.targets_BV, slot_ids_B=slots_B)


def _pair_loss(engine: DeepSpeedEngine, pair: TeachingPair, meta: FrozenMeta) -> Callable[[TeacherBatch], Tensor]:
    return lambda batch: pair_step(engine, pair, meta, batch, DistillConfig(), log=False).loss


def _whole_numel(module: nn.Module, ep_size: int) -> int:
    """Parameters of the module with all its experts."""
    return sum(p.numel() * (ep_size if getattr(p, "group_name", "") else 1) for p in module.parameters())


def to_json(measured: Measured) -> dict[str, Any]:
    """Plain data."""
    return dict(vars(measured))

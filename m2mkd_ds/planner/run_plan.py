"""`m2mkd plan`: for every phase of a run, what it needs and how long it takes on a cluster.

    RunConfig + RunCluster -> parameters, FLOPs (work.py), memory (rank_memory.py), bytes on the wire (wire.py) -> PhasePlan, RunPlan

Memory is found by running the step on shapes, FLOPs and bytes are counted; MFU and bandwidths are the caller's assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from m2mkd_ds.config import PAIR_PHASES, PhaseConfig, RunConfig
from m2mkd_ds.logs import Progress
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch
from m2mkd_ds.models.vmoe import arch_from_config
from m2mkd_ds.planner.answer_bytes import AnswerBytes
from m2mkd_ds.planner.flops import experts_a_token, vit_stage_tokens
from m2mkd_ds.planner.ledger import Moment
from m2mkd_ds.planner.partition import Partition
from m2mkd_ds.planner.rank_memory import Layout, MemoryModel, why_refused
from m2mkd_ds.planner.run_cluster import RunCluster
from m2mkd_ds.planner.scenes import STUDENT_PHASES, SceneSettings, all_pairs, phase_config, vit_stages
from m2mkd_ds.planner.wire import Wire, wire
from m2mkd_ds.planner.work import Parameters, WorkOfImage, count, work_of_image

EQUAL_SHARE = 0.05
"""Predicted rates that differ by less are as good as equal: they rest on an assumed MFU, assumed bandwidths, and full overlap."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images a second of the whole job."""

    compute: float
    network: float | None
    """None: nothing is sent."""
    loader: float | None
    """None: not given."""
    serial: float
    """If nothing overlapped: compute and network one after the other."""

    @property
    def images_per_s(self) -> float:
        """The narrowest of the three, with all else hidden behind it."""
        return min(rate for rate in (self.compute, self.network, self.loader) if rate is not None)

    @property
    def limit(self) -> str:
        """What that is."""
        rates = {"compute": self.compute, "network": self.network, "loader": self.loader}
        return min((name for name, rate in rates.items() if rate is not None), key=lambda name: rates[name] or 0.0)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table over settings: a layout, and what it would be like."""

    ds_config: str
    ep_size: int
    micro_batch_size: int
    accumulation: int | None
    """That keeps the phase's global batch; None: this micro-batch does not divide it."""
    refused: str = ""
    """Why the trainer would not start."""
    peak_bytes: int | None = None
    over_bytes: float | None = None
    """Above what a rank has; negative: room that is left."""
    speed: Speed | None = None

    @property
    def fits(self) -> bool:
        return self.over_bytes is not None and self.over_bytes <= 0


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """All numbers of a phase as the run is configured, the table over settings, and the one that is recommended."""

    name: str
    layout: Layout
    ds_config: str
    global_batch: int
    parameters: Parameters
    work: WorkOfImage
    memory: Moment | None
    """None: the configuration is refused."""
    refused: str
    wire: Wire | None
    speed: Speed | None
    steps: int | None
    """None: the images of an epoch are not known."""
    hours: float | None
    settings: tuple[Setting, ...]
    recommended: Setting | None
    why: str


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run on a cluster."""

    name: str
    cluster: RunCluster
    images: int
    """Of an epoch; 0: not known."""
    phases: tuple[PhasePlan, ...]

    @property
    def hours(self) -> float | None:
        """Of all phases, one after the other."""
        hours = [phase.hours for phase in self.phases]
        return None if None in hours else sum(hour for hour in hours if hour is not None)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned, besides run and cluster."""

    phases: tuple[str, ...]
    images: int = 0
    zero_files: Mapping[str, Mapping[str, Any]]
    """The block zero_optimization by engine file: those of the phases, and zero1, zero2, zero3 for the table."""
    table: tuple[str, ...] = ("zero1", "zero2", "zero3")
    """Engine files of the table."""
    pairs: tuple[int, ...] = ()
    """Teaching pairs in one job; empty: all."""
    largest_micro_batch: int = 512
    imbalance: float = 1.0
    """Rows of the busiest expert over the mean."""


def plan_run(config: RunConfig, cluster: RunCluster, options: PlanOptions) -> RunPlan:
    """The plan. Raises ValueError for architectures whose FLOPs are not known."""
    plans: list[PhasePlan] = []
    with Progress(len(options.phases), "plan") as bar:  # the phases of a large model take ten seconds each
        for name in options.phases:
            plans.append(_PhasePlanner(config, cluster, options, name).plan())
            bar.advance(note=name)
    return RunPlan(name=config.name, cluster=cluster, images=options.images, phases=tuple(plans))


class _PhasePlanner:
    """One phase: what all its layouts share is computed once."""

    def __init__(self, config: RunConfig, cluster: RunCluster, options: PlanOptions, name: str) -> None:
        self.config, self.cluster, self.options, self.name = config, cluster, options, name
        self.phase: PhaseConfig = phase_config(config, name)
        bf16_units = cluster.device == "gpu"  # what precision=auto asks the hardware for
        self.precision = {"fp32": "fp32", "bf16": "bf16"}.get(self.phase.precision, "bf16" if bf16_units else "fp32")
        pairs = options.pairs if name in PAIR_PHASES else ()
        self.layout = Layout(
            ranks=cluster.ranks, ep_size=self.phase.ep_size if name in STUDENT_PHASES else 1, micro_batch_size=self.phase.micro_batch_size,
            accumulation=self.phase.gradient_accumulation_steps, precision=self.precision,
            zero=dict(options.zero_files[self.phase.ds_config]), is_gpu=cluster.device == "gpu",
            with_teacher=config.teacher.feed == "colocated", pairs=pairs, imbalance=options.imbalance,
        )  # fmt: skip
        self.global_batch = self.phase.micro_batch_size * self.phase.gradient_accumulation_steps * cluster.ranks
        (meta,) = vit_stages(VitArch.from_meta(config), [StageSpan.whole(sum(config.meta.depths))])
        self.teacher_tokens, self.teacher_width = vit_stage_tokens(meta), int(meta.embed_dim)
        self.memory = MemoryModel(config, name)
        dummy = SceneSettings(
            dtype=torch.float32, backend="loop", pairs=pairs, with_teacher=self.layout.with_teacher
        )  # fmt: skip
        self.parameters = count(config, name, dummy)
        self.work = work_of_image(config, name, dummy)

    def plan(self) -> PhasePlan:
        refused = why_refused(self.config, self.name, self.layout)
        settings = tuple(self._settings())
        chosen, why = recommend(settings, self.cluster, ep_asked=self.layout.ep_size, micro_batch_asked=self.phase.micro_batch_size)
        steps = self._steps()
        sent = None if refused else self._wire(self.layout)
        speed = None if sent is None else self._speed(self.layout, sent)
        hours = None if steps is None or speed is None else steps * self.global_batch / speed.images_per_s / 3600
        return PhasePlan(
            name=self.name, layout=self.layout, ds_config=self.phase.ds_config, global_batch=self.global_batch, parameters=self.parameters,
            work=self.work, memory=None if refused else self.memory.peak(self.layout), refused=refused, wire=sent, speed=speed, steps=steps,
            hours=hours, settings=settings, recommended=chosen, why=why,
        )  # fmt: skip

    def _settings(self) -> list[Setting]:
        """Every engine file, every number of ranks that may share experts, every power of two as micro-batch."""
        experts = self.config.student.moe.num_experts
        shares = [ep for ep in range(1, min(experts, self.cluster.ranks) + 1) if not experts % ep and not self.cluster.ranks % ep]
        shares = shares if self.name in STUDENT_PHASES else [1]
        sizes = [2**n for n in range(self.options.largest_micro_batch.bit_length()) if 2**n <= self.options.largest_micro_batch]
        return [self._setting(file, ep, size) for file in self.options.table for ep in shares for size in sizes]

    def _setting(self, file: str, ep_size: int, size: int) -> Setting:
        accumulation, left = divmod(self.global_batch, size * self.cluster.ranks)
        layout = replace(
            self.layout, ep_size=ep_size, micro_batch_size=size, accumulation=max(accumulation, 1), zero=dict(self.options.zero_files[file])
        )
        keeps = accumulation if accumulation and not left else None
        known = Setting(ds_config=file, ep_size=ep_size, micro_batch_size=size, accumulation=keeps)
        refused = why_refused(self.config, self.name, layout)
        if refused:
            return replace(known, refused=refused)
        peak = self.memory.peak(layout, exact=False).total
        speed = self._speed(layout, self._wire(layout))
        return replace(known, peak_bytes=peak, over_bytes=peak - self.cluster.usable_bytes, speed=speed)

    def _wire(self, layout: Layout) -> Wire:
        parts: Sequence[Partition] = self.memory.partitions(layout)
        return wire(parts, layout, self.cluster, exchanged_numbers=self._exchanged() if layout.ep_size > 1 else 0.0,
                    teacher_image_bytes=self._teacher_bytes())  # fmt: skip

    def _speed(self, layout: Layout, sent: Wire) -> Speed:
        images = layout.micro_batch_size * layout.accumulation * self.cluster.ranks
        compute = self.cluster.flops_per_s / self.work.total
        loader = self.cluster.loader_images_per_s * self.cluster.nodes or None
        network = images / sent.network_s if sent.network_s else None
        serial = images / (images / compute + sent.network_s)
        return Speed(compute=compute, network=network, loader=loader, serial=min(serial, loader or serial))

    def _exchanged(self) -> float:
        """Elements of an image's rows in all MoE blocks that the job runs."""
        arch = arch_from_config(self.config)
        tokens = self.teacher_tokens
        if self.name != "m2mkd":
            return len(arch.moe_blocks) * arch.num_tokens * experts_a_token(arch) * arch.embed_dim
        rows = 0.0
        for pair in all_pairs(self.config):
            if not self.layout.pairs or pair.index in self.layout.pairs:
                blocks = len(set(pair.student.blocks) & set(arch.moe_blocks))
                rows += blocks * (arch.num_tokens if pair.is_first else tokens) * experts_a_token(arch)
        return rows * arch.embed_dim

    def _teacher_bytes(self) -> float:
        """Of one image, with a teacher elsewhere."""
        teacher = self.config.teacher
        if self.name != "m2mkd" or not teacher.is_remote:
            return 0.0
        sizes = AnswerBytes(data=self.config.data, precision=self.precision, tokens=self.teacher_tokens, width=self.teacher_width)
        dtype = self.precision if teacher.wire_dtype == "auto" else teacher.wire_dtype.replace("fp16", "bf16")
        pairs = self.layout.pairs or tuple(pair.index for pair in all_pairs(self.config))
        return sizes.an_image(teacher.payload, dtype, pairs)

    def _steps(self) -> int | None:
        if not self.options.images:
            return None
        if self.name == "baseline":  # as many as both phases that it is compared with
            both = [phase_config(self.config, name) for name in ("m2mkd", "end_to_end")]
            return sum(_num_steps(phase, self.options.images, self.cluster.ranks) for phase in both)
        return _num_steps(self.phase, self.options.images, self.cluster.ranks)


def _num_steps(phase: PhaseConfig, images: int, ranks: int) -> int:
    batch = phase.micro_batch_size * phase.gradient_accumulation_steps * ranks
    steps = max(1, round(phase.epochs * images / batch))
    return min(steps, phase.max_steps) if phase.max_steps else steps


def recommend(settings: Sequence[Setting], cluster: RunCluster, *, ep_asked: int, micro_batch_asked: int) -> tuple[Setting | None, str]:
    """The setting to take, and why: of those that fit, keep the global batch and are predicted within EQUAL_SHARE of the fastest, the
    simplest: whole experts, then the lowest stage of ZeRO, then the micro-batch as configured, else the largest one."""
    fitting = [one for one in settings if one.fits and one.accumulation is not None and one.speed is not None]
    if not fitting:
        return None, _why_none(settings)

    def effort(one: Setting) -> tuple[int, str, bool, int]:
        """`ds_config`: the names of the table rise with the stage."""
        return one.ep_size, one.ds_config, one.micro_batch_size != micro_batch_asked, -one.micro_batch_size

    fastest = min(fitting, key=lambda one: (-_rate(one), effort(one)))
    best = min((one for one in fitting if _rate(one) >= (1 - EQUAL_SHARE) * _rate(fastest)), key=effort)
    assert best.speed is not None
    reasons = [f"{best.speed.limit} is its limit"]
    if best.ep_size > 1:
        reasons.append(f"whole experts do not fit, or are more than {100 * EQUAL_SHARE:g} % slower")
    elif ep_asked > 1:
        reasons.append("whole experts fit, and nothing has to be exchanged")
    if best.ds_config != settings[0].ds_config:
        reasons.append(f"{settings[0].ds_config} with ep_size {best.ep_size} does not fit, or is more than {100 * EQUAL_SHARE:g} % slower")
    gain = _rate(fastest) / _rate(best) - 1
    if gain >= 0.001:
        other = f"{fastest.ds_config} with ep_size {fastest.ep_size} and micro-batch {fastest.micro_batch_size}"
        reasons.append(f"{other} would gain {100 * gain:.1f} %, too little to change it for")
    room = -(best.over_bytes or 0.0) / 1e9
    return best, "; ".join([*reasons, f"{room:.1f} GB of {cluster.usable_bytes / 1e9:.1f} stay free"])


def _rate(one: Setting) -> float:
    assert one.speed is not None
    return one.speed.images_per_s


def _why_none(settings: Sequence[Setting]) -> str:
    closest = min((one for one in settings if one.over_bytes is not None), key=lambda one: one.over_bytes or 0.0, default=None)
    if closest is None:
        return "every setting is refused"
    if closest.fits:
        return "no micro-batch that fits divides the global batch; change gradient_accumulation_steps"
    return f"nothing fits: the smallest need is {(closest.over_bytes or 0) / 1e9:.1f} GB above what a rank has; use more ranks"

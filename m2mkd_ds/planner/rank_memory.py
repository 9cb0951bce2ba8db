"""Memory of one rank for a phase, a layout and a micro-batch: scene -> trace -> engines -> the fullest moment.

Traces are kept, because many layouts share one: ZeRO's stage changes nothing about activations. A micro-batch that was not traced lies on
the line through two that were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from m2mkd_ds.config import RunConfig
from m2mkd_ds.planner.engine_memory import EngineSettings
from m2mkd_ds.planner.ledger import Moment
from m2mkd_ds.planner.partition import Partition, partition
from m2mkd_ds.planner.phase_memory import Statics, phase_peak
from m2mkd_ds.planner.scenes import STUDENT_PHASES, SceneSettings, make_scene, phase_config, trained_modules
from m2mkd_ds.planner.step_trace import Arrival, Scene, SceneTrace, StepTrace, trace_scene

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a phase is laid out on ranks."""

    ranks: int
    ep_size: int = 1
    micro_batch_size: int
    accumulation: int = 1
    precision: str
    """fp32 or bf16."""
    zero: dict[str, Any] = field(default_factory=dict)
    """The block zero_optimization of the engine's file."""
    is_gpu: bool
    with_teacher: bool = True
    pairs: tuple[int, ...] = ()
    """Teaching pairs in one job; empty: all."""
    imbalance: float = 1.0
    """Rows of the busiest expert over the mean."""
    arriving: float = 0.0
    """Of spread experts: rows that the fullest rank computes over those that it sends; 0: as follows from `imbalance`."""

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])


class MemoryModel:
    """Of one phase of a run, for one device and precision."""

    def __init__(self, config: RunConfig, phase: str) -> None:
        self.config, self.phase = config, phase
        self._scenes: dict[tuple[Any, ...], Scene] = {}
        self._traces: dict[tuple[Any, ...], SceneTrace] = {}
        self._parts: dict[tuple[Any, ...], list[Partition]] = {}
        self._statics: dict[tuple[Any, ...], Statics] = {}

    def peak(self, layout: Layout, *, exact: bool = True) -> Moment:
        """The fullest moment. `exact`: trace this very micro-batch, else compute it from those of 2 and 4 images (a second each, once).

        Raises ValueError for a layout that is refused.
        """
        self._check(layout)
        trace = self.trace(layout, layout.micro_batch_size) if exact else self._on_line(layout)
        zero = layout.zero
        settings = EngineSettings(
            stage=layout.stage, precision=layout.precision, bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            overlap=bool(zero.get("overlap_comm", False)), zero=zero, is_gpu=layout.is_gpu,
        )  # fmt: skip
        parts = self.partitions(layout)
        names = [f"{self.phase} pair {i}" if len(parts) > 1 else self.phase for i in range(len(parts))]
        return phase_peak(trace, parts, names, self.statics(layout), settings, layout.accumulation)

    def trace(self, layout: Layout, micro_batch_size: int) -> SceneTrace:
        """The step on the meta device."""
        key = (self._key(layout), micro_batch_size)
        if key not in self._traces:
            self._traces[key] = trace_scene(self._scene(layout), micro_batch_size)
        return self._traces[key]

    def partitions(self, layout: Layout) -> list[Partition]:
        """One a trainee."""
        key = (layout.ranks, *self._key(layout))
        if key not in self._parts:
            self._parts[key] = [
                partition(trainee.module, layout.ranks, layout.ep_size) for trainee in self._scene(layout).trainees
            ]
        return self._parts[key]

    def statics(self, layout: Layout) -> Statics:
        """Frozen modules, and copies of the moving average."""
        key = self._key(layout)
        if key not in self._statics:
            count = _bytes_in(DTYPES[layout.precision])
            frozen = sum(map(count, self._scene(layout).frozen))
            averaged = phase_config(self.config, self.phase).ema_decay > 0
            copies = tuple(map(count, trained_modules(self.config, self.phase, layout.pairs).values())) if averaged else ()
            self._statics[key] = Statics(frozen=frozen, average_copies=copies)
        return self._statics[key]

    def _scene(self, layout: Layout) -> Scene:
        key = self._key(layout)
        if key not in self._scenes:
            settings = SceneSettings(
                dtype=DTYPES[layout.precision], backend=self._backend(layout), ep_size=layout.ep_size, pairs=layout.pairs,
                with_teacher=layout.with_teacher, imbalance=layout.imbalance, arriving=layout.arriving,
            )  # fmt: skip
            self._scenes[key] = make_scene(self.config, self.phase, settings)
        return self._scenes[key]

    def _key(self, layout: Layout) -> tuple[Any, ...]:
        return (layout.ep_size, layout.precision, layout.is_gpu, layout.with_teacher, layout.pairs, layout.imbalance, layout.arriving)

    def _backend(self, layout: Layout) -> str:
        """What the experts keep: `fused` by itself on a CPU; all others keep rows, z and h, as `loop` does."""
        asked = self.config.student.moe.backend
        return "fused" if asked == "fused" or (asked == "auto" and not layout.is_gpu) else "loop"

    def _check(self, layout: Layout) -> None:
        reason = why_refused(self.config, self.phase, layout)
        if reason:
            raise ValueError(reason)

    def _on_line(self, layout: Layout) -> SceneTrace:
        small, large = self.trace(layout, 2), self.trace(layout, 4)
        return _line(small, large, layout.micro_batch_size)


def why_refused(config: RunConfig, phase: str, layout: Layout) -> str:
    """Why the trainer would not start with this layout; empty if it would."""
    ep, experts = layout.ep_size, config.student.moe.num_experts
    if ep == 1:
        return ""
    if phase not in STUDENT_PHASES:
        return "no experts in this phase"
    if layout.ranks % ep:
        return f"ep_size {ep} does not divide {layout.ranks} ranks"
    if experts % ep:
        return f"ep_size {ep} does not divide {experts} experts"
    return "ZeRO-3 does not work with spread experts" if layout.stage == 3 else ""


def _bytes_in(dtype: torch.dtype) -> Any:
    def count(module: nn.Module) -> int:
        tensors = [*module.parameters(), *module.buffers()]
        return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in tensors)

    return count


def _line(small: SceneTrace, large: SceneTrace, images: int) -> SceneTrace:
    """From the traces of 2 and 4 images to that of `images`."""

    def at(a: int, b: int) -> int:
        return max(0, round(a + (b - a) / 2 * (images - 2)))

    def arrivals(a: Sequence[Arrival], b: Sequence[Arrival]) -> tuple[Arrival, ...]:
        return tuple(
            Arrival(x.name, x.grad_bytes, max(at(x.peak, y.peak), x.grad_bytes), at(x.left, y.left)) for x, y in zip(a, b, strict=True)
        )

    steps = tuple(
        StepTrace(at(x.forward_peak, y.forward_peak), at(x.saved, y.saved), arrivals(x.arrivals, y.arrivals), at(x.end_peak, y.end_peak))
        for x, y in zip(small.steps, large.steps, strict=True)
    )
    return SceneTrace(at(small.feed_peak, large.feed_peak), at(small.batch, large.batch), steps)

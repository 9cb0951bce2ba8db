"""Timing: all cases in turn, round by round (A B C A B C, not AAA BBB), so that a slow moment of the machine meets all of them.

Forward and backward are timed apart: by the clock on a CPU, by events on a GPU, whose L2 cache is flushed before each pass. With
several ranks, all start a pass together, and rank 0's clock ends the rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

from m2mkd_ds.bench.cases import Case
from m2mkd_ds.distributed.world import World, barrier, broadcast_object
from m2mkd_ds.logs import Progress

MIN_ROUNDS = 3
_FLUSH_BYTES = 256 << 20
"""More than any GPU's L2 cache."""


@dataclass
class Samples:
    """Milliseconds of every round of one case."""

    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)

    @property
    def total_ms(self) -> list[float]:
        return [f + b for f, b in zip(self.forward_ms, self.backward_ms, strict=True)]


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Percentiles interpolate between the two nearest samples, so with few rounds they lie inside the extremes."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        tenths = quantiles(values, n=10, method="inclusive")
        return Spread(median(values), tenths[0], tenths[-1])


def measure(cases: Sequence[Case], rounds: int, *, seconds: float, device: torch.device, world: World, bar: Progress) -> dict[str, Samples]:
    """Up to `rounds` rounds over all cases (at least MIN_ROUNDS, or `rounds` if that is less), within `seconds` where 0 is no limit."""
    samples = {case.peer: Samples() for case in cases}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    started = time.perf_counter()
    with _no_garbage_collection():
        for done in range(rounds):
            spent = time.perf_counter() - started
            # The next round is expected to last as long as the mean one.
            late = bool(seconds) and done >= MIN_ROUNDS and spent + spent / done > seconds
            if world.size > 1:
                late = broadcast_object(late)
            if late:
                bar.advance((rounds - done) * len(cases))
                break
            for case in cases:
                case.clear()
                if world.size > 1:
                    barrier()
                forward_ms, backward_ms = _cuda_pass(case, flush) if flush is not None else _cpu_pass(case)
                case.clear()
                samples[case.peer].forward_ms.append(forward_ms)
                samples[case.peer].backward_ms.append(backward_ms)
                bar.advance(note=f"{case.peer} {forward_ms + backward_ms:.1f} ms")
    return samples


def _cpu_pass(case: Case) -> tuple[float, float]:
    start = time.perf_counter()
    output = case.forward().output
    middle = time.perf_counter()
    case.backward(output)
    end = time.perf_counter()
    return 1e3 * (middle - start), 1e3 * (end - middle)


def _cuda_pass(case: Case, flush: torch.Tensor) -> tuple[float, float]:
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    flush.zero_()
    start.record()
    output = case.forward().output
    middle.record()
    case.backward(output)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(end)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect once, then never inside: a collection would land in somebody's time."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

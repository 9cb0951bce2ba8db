"""One pass of one reader: wall time, CPU time, memory, and how long the first batch took.

CPU time is that of the main process and its loader workers, between two moments at which no worker has anything to do: after the
first batch, when what was read ahead is done, and at the end of a whole pass. Starting an interpreter is not in it (an epoch of
ImageNet takes ten thousand times as long), and nothing that a worker does for the pass is left out.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IDLE_S = 0.15
"""Workers that used no CPU time for so long have nothing to do."""
IDLE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Opened:
    """A reader that is ready for passes."""

    batches: Iterable[Any]
    """Each iteration is a whole pass over the shards; loader workers stay between passes."""
    finish: Callable[[Any], int]
    """What the main process does to a batch before the model can have it; returns the number of its images."""


@dataclass(frozen=True)
class Pass:
    """What one pass took."""

    images: int
    wall_s: float
    cpu_s: float
    first_batch_s: float
    """From opening the folder to the first batch, start of the workers included."""
    peak_rss_bytes: int
    """Of the main process and its workers, added up; pages that they share are counted in each."""


def measure_pass(open_reader: Callable[[], Opened]) -> Pass:
    """Open the reader, take its first batch, then time one whole pass. Workers have ended when this returns."""
    gc.collect()
    _reset_peak_rss()
    others = _children()
    started = time.perf_counter()
    opened = open_reader()
    opened.finish(next(iter(opened.batches)))
    first_batch_s = time.perf_counter() - started
    workers = sorted(_children() - others)
    _wait_until_idle(workers)
    cpu_before, started, images = _cpu_s(workers), time.perf_counter(), 0
    for batch in opened.batches:
        images += opened.finish(batch)
    wall_s, cpu_s = time.perf_counter() - started, _cpu_s(workers) - cpu_before
    peak = _peak_rss("self") + sum(_peak_rss(pid) for pid in workers)
    del opened
    if workers:
        gc.collect()  # the loader's last reference goes, and with it its workers
        _wait_until_gone(workers)
    return Pass(images, wall_s, cpu_s, first_batch_s, peak)


def _children() -> set[int]:
    """Processes that this one has started with multiprocessing and that have not ended."""
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def _cpu_s(workers: list[int]) -> float:
    """CPU seconds so far of this process (all threads) and of its workers."""
    # Linux: the CPU clock of another process has the number ~pid * 8 + 2; good to a nanosecond where /proc counts in 10 ms.
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in workers)


def _wait_until_idle(workers: list[int]) -> None:
    """Until no worker uses CPU time. Raises RuntimeError for one that never stops."""
    if not workers:
        return
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    before = -1.0
    while time.monotonic() < deadline:
        now = sum(time.clock_gettime((~pid << 3) | 2) for pid in workers)
        if now - before < 1e-3:
            return
        before = now
        time.sleep(IDLE_S)
    raise RuntimeError(f"bench loader: loader workers are still busy {IDLE_TIMEOUT_S:.0f} s after their first batch")


def _wait_until_gone(workers: list[int]) -> None:
    """The next reader must have the machine to itself. Raises RuntimeError when workers stay."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while not _children().isdisjoint(workers):
        if time.monotonic() > deadline:
            raise RuntimeError(f"bench loader: loader workers are still there {IDLE_TIMEOUT_S:.0f} s after their loader has gone")
        time.sleep(0.01)


def _reset_peak_rss() -> None:
    """Let the high-water mark of this process start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_rss(pid: int | str) -> int:
    """VmHWM in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

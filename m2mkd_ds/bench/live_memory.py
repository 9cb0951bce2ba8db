"""What a process really holds while it runs: the running total of torch's CPU allocator between marks, and the process's resident peak.

The profiler records every allocation and release of the thread that starts it, so a peak is exact and repeatable. Where a thread of gloo
is the last to hold a collective's tensor, it is that thread that releases it, which is not recorded but is in the allocator's own total
once this is made to count for all threads. Memory of gloo itself, of libraries' scratch pads and of Python is not in it; the resident
peak (VmHWM) has all that, and leaves out what was allocated and never touched.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK = "m2mkd/mark/"
_COUNT_ALL = "FLAGS_caffe2_report_cpu_memory_usage"
"""A variable of torch's libc10. True: the allocator keeps its total for every thread, not just for one that is profiled."""


class LiveMemory:
    """Filled when the `with` block of `watch` is left."""

    def __init__(self) -> None:
        self.peaks: list[tuple[str, int, int]] = []
        """(mark, bytes at the mark, peak until the next mark), in order; `start` is the first."""

    def mark(self, name: str) -> None:
        """A window begins."""
        import torch
        from torch.profiler import record_function

        with record_function(_MARK + name):
            torch.empty(1)  # an allocation tells the total


@contextmanager
def watch() -> Iterator[LiveMemory]:
    """Count allocations of this thread in the block. Raises RuntimeError on a build of torch whose allocator cannot be watched."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler first starts; it would tell of every start on stderr
    _count_all_threads()
    live = LiveMemory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        live.mark("start")
        yield live
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live.peaks = windows(events)


def _count_all_threads() -> None:
    """From now on, for as long as the process lives: a total that misses some changes would stay wrong."""
    import torch

    for library in (Path(torch.__file__).parent / "lib").glob("libc10.*"):
        try:
            ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), _COUNT_ALL).value = True
        except ValueError:
            continue
        return
    raise RuntimeError(f"torch {torch.__version__} was built without {_COUNT_ALL}, which watching memory needs; torch's own wheels have it")


def windows(events: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """(mark, running total there, largest running total until the next mark) of a profiler's trace events; the first mark is at 0."""
    marks = sorted((event for event in events if str(event.get("name")).startswith(_MARK)), key=lambda event: event["ts"])
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    found: list[tuple[str, int, int]] = []
    for mark, until_us in zip(marks, [*(mark["ts"] for mark in marks[1:]), float("inf")], strict=True):
        inside_us = mark["ts"] + mark["dur"]
        told = next(event["args"] for event in memory if mark["ts"] <= event["ts"] <= inside_us)  # by the mark's own allocation
        at = told["Total Allocated"] - told["Bytes"]
        peak = max([at, *(event["args"]["Total Allocated"] for event in memory if inside_us < event["ts"] < until_us)])
        found.append((mark["name"].removeprefix(_MARK), at, peak))
    before = found[0][1]
    return [(name, at - before, peak - before) for name, at, peak in found]


def resident_peak() -> int | None:
    """VmHWM of this process in bytes; None where the system does not tell (it is not a Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def reset_resident_peak() -> None:
    """Let VmHWM start again from what is resident now, where the system lets us."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="utf-8")

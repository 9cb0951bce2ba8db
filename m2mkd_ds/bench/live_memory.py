"""What a process really holds while it runs: the running total of torch's CPU allocator between marks, and the process's resident peak.

The profiler records every allocation and release of the thread that starts it, so a peak is exact and repeatable. Memory of gloo's
own threads, of libraries' scratch pads and of Python is not in it; the resident peak (VmHWM) has all that, and leaves out what was
allocated and never touched.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK = "m2mkd/mark/"


class LiveMemory:
    """Filled when the `with` block of `watch` is left."""

    def __init__(self) -> None:
        self.peaks: list[tuple[str, int, int]] = []
        """(mark, bytes at the mark, peak until the next mark), in order; `start` is the first."""

    def mark(self, name: str) -> None:
        """A window begins."""
        from torch.profiler import record_function

        with record_function(_MARK + name):
            pass


@contextmanager
def watch() -> Iterator[LiveMemory]:
    """Count allocations of this thread in the block."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler first starts; it would tell of every start on stderr
    live = LiveMemory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield live
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live.peaks = windows(events)


def windows(events: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """(mark, running total there, largest running total until the next mark) of a profiler's trace events."""
    changes = [(event["ts"], event["args"]["Bytes"], "") for event in events if event.get("name") == "[memory]"]
    marks = [(event["ts"], 0, event["name"].removeprefix(_MARK)) for event in events if str(event.get("name")).startswith(_MARK)]
    found: list[tuple[str, int, int]] = []
    name, total, at, peak = "start", 0, 0, 0
    for _, num_bytes, mark in sorted([*changes, *marks], key=lambda event: event[0]):  # stable: equal times stay in order
        if mark:
            found.append((name, at, peak))
            name, at, peak = mark, total, total
        total += num_bytes
        peak = max(peak, total)
    return [*found, (name, at, peak)]


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

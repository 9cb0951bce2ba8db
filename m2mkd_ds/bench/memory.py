"""Memory of one forward and backward pass above what was there before it: the peak, and what the forward pass leaves for the backward.

On a GPU from the caching allocator's counters. On a CPU from the profiler's list of every allocation and release, which is exact
and repeatable (the process's resident size is neither).
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.bench.cases import Case, Ran

_FORWARD_ENDS = "m2mkd/forward_ends"


@dataclass(frozen=True)
class Memory:
    """Bytes above the inputs, weights and their like, which are there before the pass."""

    peak_bytes: int
    """Largest total during forward and backward; the gradients of weights and input are part of it."""
    saved_bytes: int
    """Held after the forward pass for the backward, the output itself not counted."""


def run_once(case: Case, device: torch.device) -> tuple[Ran, Memory]:
    """One pass; its gradients are left on the leaves."""
    case.clear()
    return _cuda_run(case, device) if device.type == "cuda" else _cpu_run(case)


def _output_bytes(ran: Ran) -> int:
    return ran.output.untyped_storage().nbytes()


def _cuda_run(case: Case, device: torch.device) -> tuple[Ran, Memory]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    ran = case.forward()
    after_forward = torch.cuda.memory_allocated(device)
    case.backward(ran.output)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return ran, Memory(peak, max(after_forward - before - _output_bytes(ran), 0))


def _cpu_run(case: Case) -> tuple[Ran, Memory]:
    from torch.profiler import ProfilerActivity, profile, record_function

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the profiler first starts; it would tell of every start on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ran = case.forward()
        with record_function(_FORWARD_ENDS):
            pass
        case.backward(ran.output)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    peak, after_forward = account(events)
    return ran, Memory(peak, max(after_forward - _output_bytes(ran), 0))


def account(events: list[dict[str, Any]]) -> tuple[int, int]:
    """(largest running total of allocated bytes, running total at the mark) of a profiler's trace events."""
    mark = next(event["ts"] for event in events if event.get("name") == _FORWARD_ENDS)
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: equal times stay in the order of recording
    total = peak = at_mark = 0
    for time_us, num_bytes in changes:
        total += num_bytes
        peak = max(peak, total)
        if time_us <= mark:
            at_mark = total
    return peak, at_mark

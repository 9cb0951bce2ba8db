"""`m2mkd bench experts`: every level, routing and peer that was asked for, in one process a rank. Returns text, writes files.

options -> workload -> cases -> one pass each (memory, error, warm-up) -> timed rounds in turn -> rows -> table, JSON, plot
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.bench import exchange, peers
from m2mkd_ds.bench.cases import Absent, Case, ffn_cases
from m2mkd_ds.bench.environment import describe
from m2mkd_ds.bench.layer_cases import layer_cases
from m2mkd_ds.bench.measure import Samples, measure
from m2mkd_ds.bench.memory import Memory, run_once
from m2mkd_ds.bench.numerics import Error, Oracle, error_of, make_oracle
from m2mkd_ds.bench.options import ExpertBench, Level, Routing
from m2mkd_ds.bench.output import SCHEMA, render, write_files
from m2mkd_ds.bench.rows import Local, Row, make_row, merge, with_shares
from m2mkd_ds.bench.step import images_for, step_cases
from m2mkd_ds.bench.workload import Workload, make_workload
from m2mkd_ds.distributed.world import World, gather_object
from m2mkd_ds.logs import Progress, logger
from m2mkd_ds.moe.backends import BACKENDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS: dict[Level, float] = {"layer": 10.0, "ffn": 4.0, "a2a": 0.5, "step": 5.0}
"""Shares of the time that is left, by level."""
ROUTING_TOLERANCE = 1e-3
"""Share of rows that a peer's gate may route otherwise with `router`, where two logits can tie but for rounding; else none may."""


def run_experts(options: ExpertBench, world: World) -> str:
    """Measure, write what `--out` asks for, and return the tables. Raises ValueError for what this machine or job cannot do."""
    options.check()
    peers.check(options)
    device, dtype_name = resolve(options, world)
    bench = _Bench(options, world, device, DTYPES[dtype_name])
    started = time.perf_counter()
    rows = bench.run()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": options.command(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "device": device.type,
        "dtype": dtype_name,
        "ranks": world.size,
        "environment": describe(device),
        "wall_s": round(time.perf_counter() - started, 1),
        "rows": [row.to_json() for row in rows],
    }
    text = render(result, rows)
    if options.out is not None and world.is_main:
        text += "\n" + "\n".join(f"wrote {path}" for path in write_files(result, rows, options.out))
    return text


def resolve(options: ExpertBench, world: World) -> tuple[torch.device, str]:
    """The device of this rank and the name of the dtype. Raises ValueError if the job does not run on the device asked for."""
    kind = world.device.type
    if options.device not in ("auto", kind):
        raise ValueError(
            f"--device is {options.device}, and this job runs on {kind}; "
            + ("torch sees no CUDA device" if options.device == "cuda" else "set DS_ACCELERATOR=cpu before the start")
        )
    if options.dtype == "auto":
        return world.device, "bf16" if kind == "cuda" else "fp32"
    return world.device, options.dtype


@dataclass(frozen=True)
class _Group:
    """Cases that are measured in turn with each other."""

    level: Level
    routing: Routing


@dataclass(frozen=True)
class _Ready:
    """A case after its first pass."""

    case: Case
    memory: Memory
    error: Error | None


class _Bench:
    """One run: walks through the groups and shares out the time."""

    def __init__(self, options: ExpertBench, world: World, device: torch.device, dtype: torch.dtype) -> None:
        self.options, self.world, self.device, self.dtype = options, world, device, dtype

    def run(self) -> list[Row]:
        o = self.options
        # By routing, so that one workload at a time is in memory.
        groups = [_Group(level, routing) for routing in o.routing for level in o.levels if level != "step" and routing in o.routings(level)]
        groups += [_Group("step", routing) for routing in o.routings("step") if "step" in o.levels]
        rows: list[Row] = []
        started = time.perf_counter()
        work: Workload | None = None
        for number, group in enumerate(groups):
            if group.level != "step" and (work is None or work.routing != group.routing):
                work = None  # the old one goes before the new one comes
                work = make_workload(o, group.routing, rank=self.world.rank, device=self.device, dtype=self.dtype)
            left = sum(WEIGHTS[other.level] for other in groups[number:])
            # Against a clock that never stops at 0: with the budget spent, groups still get their least rounds.
            seconds = max(o.budget_s - (time.perf_counter() - started), 1e-3) * WEIGHTS[group.level] / left if o.budget_s else 0.0
            rows += self._group(group, work, seconds)
        return self._finish(rows)

    def _group(self, group: _Group, work: Workload | None, seconds: float) -> list[Row]:
        o, level = self.options, group.level
        started = time.perf_counter()
        found = self._cases(group, work)
        cases = [case for case in found if isinstance(case, Case)]
        rounds = o.rounds(level, self.device.type)
        ready: dict[str, _Ready] = {}
        absent = [case for case in found if isinstance(case, Absent)]
        with Progress((rounds + 1) * len(cases), f"{level}, {group.routing}", enabled=self.world.is_main) as bar:
            oracle = make_oracle(work, level, self.world) if work is not None and level in ("layer", "ffn") else None
            for case in cases:
                first = self._first_pass(case, oracle, work, group)
                bar.advance(note=case.peer)
                if isinstance(first, Absent):
                    absent.append(first)
                    bar.advance(rounds)
                else:
                    ready[case.peer] = first
            del oracle
            measured = [r.case for r in ready.values()]
            seconds = max(seconds - (time.perf_counter() - started), 1e-3) if seconds else 0.0
            samples = measure(measured, rounds, seconds=seconds, device=self.device, world=self.world, bar=bar)
        rows = [self._row(group, ready[peer], times, work) for peer, times in samples.items()]
        order = [case.peer for case in found]
        rows += [Row(level, group.routing, gone.peer, available=False, reason=gone.reason) for gone in absent]
        return sorted(rows, key=lambda row: order.index(row.peer))

    def _cases(self, group: _Group, work: Workload | None) -> list[Case | Absent]:
        names = peers.chosen(self.options, group.level, group.routing)
        if group.level == "step":
            return step_cases(self.options, names, rank=self.world.rank, device=self.device, dtype=self.dtype)
        assert work is not None
        if group.level == "a2a":
            return [exchange.exchange_case(work, self.world)]
        return ffn_cases(work, names) if group.level == "ffn" else layer_cases(work, names, self.world)

    def _first_pass(self, case: Case, oracle: Oracle | None, work: Workload | None, group: _Group) -> _Ready | Absent:
        """Warm up (on a GPU: compile and tune too), then one pass for memory, error, and that the peer routes as planned."""
        try:
            for _ in range(2 if self.device.type == "cuda" else 0):
                case.clear()
                case.backward(case.forward().output)
            ran, memory = run_once(case, self.device)
        except torch.OutOfMemoryError as err:
            case.clear()
            return Absent(case.peer, f"out of memory: {str(err).splitlines()[0]}")
        if ran.load_E is not None and work is not None:
            _check_load(case.peer, ran.load_E.tolist(), work)
        error = error_of(case, ran, oracle) if oracle is not None and not case.peer.startswith("part:") else None
        case.clear()
        return _Ready(case, memory, error)

    def _row(self, group: _Group, ready: _Ready, times: Samples, work: Workload | None) -> Row:
        o, case = self.options, ready.case
        load = work.load if work is not None and group.level != "step" else []
        tokens = images_for(o.tokens).tokens if group.level == "step" else o.tokens
        local = Local(
            times.forward_ms,
            times.backward_ms,
            tokens,
            case.kept_rows,
            case.computed_rows,
            load,
            ready.memory.peak_bytes,
            ready.memory.saved_bytes,
            ready.error.output if ready.error else None,
            ready.error.gradient if ready.error else None,
        )
        job = merge(self._all_ranks(local))
        compute = group.level in ("ffn", "layer") and not case.peer.startswith("part:")
        row = make_row(
            group.level, group.routing, case.peer, case.note, job, dim=o.dim, hidden=o.hidden, activation=o.activation, count_flops=compute
        )
        return self._with_bytes(row, work) if group.level == "a2a" and work is not None else row

    def _with_bytes(self, row: Row, work: Workload) -> Row:
        assert row.total_ms is not None
        both = self._all_ranks(exchange.bytes_of(work, self.world))
        brought, leaving = (max(values) for values in zip(*both, strict=True))
        one_exchange_s = row.total_ms.median / 1e3 / 4  # there and back, forward and backward
        return replace(row, exchanged_bytes=brought, algbw_gb_s=brought / one_exchange_s / 1e9, busbw_gb_s=leaving / one_exchange_s / 1e9)

    def _all_ranks(self, value: Any) -> list[Any]:
        return gather_object(value) if self.world.size > 1 else [value]

    def _finish(self, rows: Sequence[Row]) -> list[Row]:
        """Rows with their shares of `dense` and `gemm`, and what the parts of our layer take."""
        own = [name for name, backend in BACKENDS.items() if not hasattr(backend, "run_layer")]
        finished: list[Row] = []
        for level, routing in dict.fromkeys((row.level, row.routing) for row in rows):
            group = [row for row in rows if (row.level, row.routing) == (level, routing)]
            finished += with_shares(group, own)
        return finished


def _check_load(peer: str, load_E: list[int], work: Workload) -> None:
    """Peers are compared on the same routing or not at all. Raises RuntimeError when a gate chose otherwise."""
    wanted_E = work.load
    differing = sum(abs(a - b) for a, b in zip(load_E, wanted_E, strict=True)) / max(sum(wanted_E), 1)
    allowed = ROUTING_TOLERANCE if work.routing == "router" else 0.0
    if differing > allowed:
        raise RuntimeError(f"bench: {peer} routes otherwise with routing {work.routing}: load {load_E}, planned {wanted_E}")
    if differing:
        logger.warning("bench: with routing %s, %s decides near-ties otherwise: load %s, planned %s", work.routing, peer, load_E, wanted_E)

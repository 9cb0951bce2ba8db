"""`m2mkd bench memory`: what `m2mkd plan` predicts against what real phases hold, in one launch a case.

The parent starts itself once a case under the launcher (`--child`), with the trainer's own phases watched; then it predicts and compares.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from m2mkd_ds.bench.memory_cases import CASES, SMALL_CASE, SPREAD_CASE, MemoryCase, case_config
from m2mkd_ds.bench.memory_rows import SCHEMA, MemoryRow, from_windows, render, write_files
from m2mkd_ds.cli.app import bench_app, out
from m2mkd_ds.config import LaunchConfig
from m2mkd_ds.logs import logger, setup_logging

ALL_CASES = (*CASES, SPREAD_CASE, SMALL_CASE)


@bench_app.command
def memory(
    *,
    cases: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = (),
    quick: bool = False,
    out_dir: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
    child: Annotated[int, tyro.conf.arg(help_behavior_hint="(not for users)")] = -1,
    folder: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(not for users)")] = None,
) -> None:
    """Measure the memory of real phases on CPU ranks and compare it with what `m2mkd plan` predicts.

    A first look, in half a minute: m2mkd bench memory --quick

    The committed result (ten to twenty minutes on two cores): m2mkd bench memory --out docs/benchmarks

    Exit code 1 if a prediction is more than 10 % off.

    Args:
        cases: Names of cases, for example "weights, 2 ranks".
        quick: One small case only.
        out_dir: Folder for plan_memory_cpu.json and .md; without it, only the table is printed.
        child: Number of the case that this rank of a launched job runs.
        folder: Where it works.
    """
    if child >= 0:
        if folder is None:
            raise ValueError("--child needs --folder; both are set by the command itself")
        _run_child(ALL_CASES[child], folder)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench memory launches its ranks itself; start it without the launcher: m2mkd bench memory")
    setup_logging()
    chosen = _chosen(cases, quick)
    started = time.perf_counter()
    rows = [row for case in chosen for row in _measure(case)]
    text = render(rows)
    if out_dir is not None:
        words = [*(["--quick"] if quick else []), *(["--cases", *cases] if cases else []), "--out", str(out_dir)]
        command = shlex.join(["m2mkd", "bench", "memory", *words])
        result = _result(command, chosen, rows, time.perf_counter() - started)
        text += "\n" + "\n".join(f"wrote {path}" for path in write_files(result, rows, out_dir))
    out(text)
    if not all(row.met for row in rows):
        raise SystemExit(1)


def _chosen(names: tuple[str, ...], quick: bool) -> list[MemoryCase]:
    if quick:
        return [SMALL_CASE]
    known = {case.name: case for case in ALL_CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"--cases {name!r}: there are {', '.join(map(repr, known))}")
    return [known[name] for name in names] or list(CASES)


def _measure(case: MemoryCase) -> list[MemoryRow]:
    """Launch a case, read what its ranks say, predict. Raises LaunchError when the job fails."""
    from m2mkd_ds.train.launching.launch import run_here

    logger.info("case %s: %d rank(s)", case.name, case.ranks)
    with tempfile.TemporaryDirectory(prefix="m2mkd_memory_") as scratch:
        words = ["bench", "memory", "--child", str(ALL_CASES.index(case)), "--folder", scratch]
        run_here(LaunchConfig(num_gpus=case.ranks, extra=("--master_addr", "127.0.0.1")), words)
        ranks = json.loads((Path(scratch) / "measured.json").read_text(encoding="utf-8"))
        return [_row(case, Path(scratch), phase, [rank[phase] for rank in ranks]) for phase in ranks[0]]


def _row(case: MemoryCase, folder: Path, phase: str, ranks: list[dict[str, Any]]) -> MemoryRow:
    from m2mkd_ds.distributed.ds_config import read_ds_config
    from m2mkd_ds.planner.rank_memory import Layout, MemoryModel

    config = case_config(case, folder)
    zero = read_ds_config(Path(config.m2mkd.ds_config))["zero_optimization"]
    layout = Layout(
        ranks=case.ranks, ep_size=case.ep_size, micro_batch_size=case.micro_batch, accumulation=case.accumulation, precision=case.precision,
        zero=zero, is_gpu=False, imbalance=_imbalance(Path(config.run_dir) / phase),
        arriving=_arriving(Path(config.run_dir) / phase, case.ep_size),
    )  # fmt: skip
    found = MemoryModel(config, phase).peak(layout)
    measured = max((from_windows(**rank) for rank in ranks), key=lambda one: one.steps_peak)
    return MemoryRow(
        case=case.name, phase=phase, ranks=case.ranks, stage=case.stage, ep_size=case.ep_size, precision=case.precision,
        micro_batch=case.micro_batch, accumulation=case.accumulation, imbalance=layout.imbalance, predicted=found.total,
        measured=measured, when=found.when, parts=found.parts,
    )  # fmt: skip


def _imbalance(folder: Path) -> float:
    """Of the routing of a phase, from its metrics: busiest expert over the mean, mean of blocks and of steps from the second on."""
    from m2mkd_ds.logs import read_metrics

    found = [
        value
        for file in folder.glob("**/metrics.jsonl")
        for line in read_metrics(file)[1:]
        for name, value in line.items()
        if name.endswith("/max_over_mean")
    ]
    return sum(found) / len(found)


def _arriving(folder: Path, ep_size: int) -> float:
    """Of the same routing: the share of the rows that the experts of the fullest rank get, times the ranks that share them; of the pair
    where that is most."""
    from m2mkd_ds.logs import read_metrics

    fullest = []
    for file in folder.glob("**/metrics.jsonl"):
        loads = [value for line in read_metrics(file)[1:] for name, value in line.items() if name.endswith("/load")]
        local = len(loads[0]) // ep_size
        ranks = [sum(sum(load[rank * local : (rank + 1) * local]) for load in loads) / len(loads) for rank in range(ep_size)]
        fullest.append(ep_size * max(ranks))
    return max(fullest)


def _result(command: str, cases: list[MemoryCase], rows: list[MemoryRow], wall_s: float) -> dict[str, Any]:
    import torch

    from m2mkd_ds.bench.environment import describe

    return {
        "schema": SCHEMA, "command": command, "cases": [asdict(case) for case in cases],
        "environment": describe(torch.device("cpu"), ("torch", "deepspeed", "timm")), "wall_s": round(wall_s, 1),
        "rows": [row.to_json() for row in rows],
    }  # fmt: skip


def _run_child(case: MemoryCase, folder: Path) -> None:
    """One rank of the case's job: runs the phases and leaves measured.json, the windows of every rank."""
    from m2mkd_ds.checkpoint.atomic import write_json_atomic
    from m2mkd_ds.cli.resolve import ensure_shards
    from m2mkd_ds.distributed.world import barrier, gather_object, init_world, shutdown
    from m2mkd_ds.train.measured_run import run_watched

    world = init_world()
    setup_logging(world.rank)
    config = case_config(case, folder)
    if world.is_main:
        ensure_shards(config)
    barrier()
    found: dict[str, dict[str, Any]] = {}
    run_watched(config, world, lambda phase: _watched(found, phase))
    ranks = gather_object(found)
    if world.is_main:
        write_json_atomic(folder / "measured.json", ranks)
    shutdown()


class _Marks:
    """Passes marks on, and watches the resident size in the steps that count."""

    def __init__(self, mark: Any) -> None:
        self._mark = mark
        self.resident_peak: int | None = None

    def mark(self, name: str) -> None:
        """A window begins."""
        from m2mkd_ds.bench.live_memory import reset_resident_peak, resident_peak

        self._mark(name)
        if name == "step 1":
            reset_resident_peak()
        elif name == "evaluate":
            self.resident_peak = resident_peak()


@contextmanager
def _watched(found: dict[str, dict[str, Any]], phase: str) -> Iterator[_Marks]:
    from m2mkd_ds.bench.live_memory import reset_resident_peak, resident_peak, watch

    reset_resident_peak()
    before = resident_peak()
    with watch() as live:
        marks = _Marks(live.mark)
        yield marks
    found[phase] = {"windows": live.peaks, "resident_peak": marks.resident_peak, "resident_before": before}

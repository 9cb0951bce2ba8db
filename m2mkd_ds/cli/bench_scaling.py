"""How `m2mkd bench scaling` gets its ranks: one launch for every number of them, results handed over in files."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.bench import spelled
from m2mkd_ds.bench.collective_time import timed_collectives
from m2mkd_ds.bench.environment import describe
from m2mkd_ds.bench.scaling import Measured, measure_job, to_json
from m2mkd_ds.bench.scaling_options import ScalingBench
from m2mkd_ds.bench.scaling_rows import SCHEMA, make_rows, render, write_files
from m2mkd_ds.checkpoint.atomic import write_json_atomic
from m2mkd_ds.cli.app import out
from m2mkd_ds.config import LaunchConfig
from m2mkd_ds.logs import setup_logging

HAND_OVER = "M2MKD_SCALING_FILE"
"""Environment variable: where a job that this command started leaves its numbers."""


def run_in_job(bench: ScalingBench) -> None:
    """On the ranks of a launched job: measure; rank 0 prints (or hands over) the result of this number of ranks."""
    from m2mkd_ds.distributed.world import init_world, shutdown

    started = time.perf_counter()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with timed_collectives() as clock:  # before DeepSpeed looks for torch's functions
        world = init_world()
        setup_logging(world.rank)
        jobs = measure_job(bench, world, clock)
        if world.is_main:
            target = os.environ.get(HAND_OVER)
            if target:
                write_json_atomic(target, [to_json(job) for job in jobs])
            else:
                out(_finish(replace(bench, ranks=(world.size,)), jobs, time.perf_counter() - started))
        shutdown()


def run_jobs(bench: ScalingBench) -> str:
    """Launch a job for every number of ranks, one after the other. Raises LaunchError when one fails."""
    from m2mkd_ds.train.launching.launch import run_here

    started = time.perf_counter()
    jobs: list[Measured] = []
    words = spelled.words(replace(bench, out=None))
    with tempfile.TemporaryDirectory(prefix="m2mkd_scaling_") as folder:
        for ranks in bench.resolved().ranks:
            file = Path(folder) / f"{ranks}.json"
            os.environ |= {HAND_OVER: str(file), "OMP_NUM_THREADS": str(bench.threads_per_rank)}
            launch = LaunchConfig(num_gpus=ranks, threads_per_rank=bench.threads_per_rank, extra=("--master_addr", "127.0.0.1"))
            run_here(launch, ["bench", "scaling", *words])
            jobs += [Measured(**job) for job in json.loads(file.read_text(encoding="utf-8"))]
    return _finish(bench, jobs, time.perf_counter() - started)


def _finish(bench: ScalingBench, jobs: Sequence[Measured], wall_s: float) -> str:
    rows = make_rows(jobs, bench.micro_batch)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(bench).items()}
    result: dict[str, Any] = {
        "schema": SCHEMA, "command": bench.command(), "options": options, "cores": jobs[0].cores, "wall_s": round(wall_s, 1),
        "environment": describe(torch.device("cpu"), ("torch", "deepspeed", "timm")), "rows": [row.to_json() for row in rows],
    }  # fmt: skip
    text = render(result, rows)
    if bench.out is not None:
        text += "\n" + "\n".join(f"wrote {path}" for path in write_files(result, rows, bench.out))
    return text

"""`m2mkd bench experts | loader | teacher | checkpoint | scaling`: measurements; `memory` is in cli/bench_memory.py."""

from __future__ import annotations

import os
from typing import Literal

import tyro

from m2mkd_ds.bench.checkpoint_options import CheckpointBench
from m2mkd_ds.bench.loader_options import LoaderBench
from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.bench.scaling_options import ScalingBench
from m2mkd_ds.bench.teacher_options import TeacherBench
from m2mkd_ds.cli.app import app, bench_app, in_world, out
from m2mkd_ds.logs import setup_logging


@app.command
def bench(what: tyro.conf.Positional[Literal["experts", "loader", "teacher", "checkpoint", "scaling", "memory"]], /) -> None:
    """Measure against other projects: `m2mkd bench experts --help`, and so on.

    Args:
        what: experts: throughput of expert compute. loader: images a second of the input pipeline. teacher: how a teacher server's
            answers travel. checkpoint: how long saving holds training up. scaling: the training step on more ranks. memory: what
            `m2mkd plan` predicts against what phases hold.
    """
    # `main` sends these words to `bench_app`; this entry is what `m2mkd --help` lists.
    bench_app.cli(prog="m2mkd bench", args=[what])


@bench_app.command
def experts(bench: tyro.conf.OmitArgPrefixes[ExpertBench]) -> None:
    """Measure expert compute against DeepSpeed's and Tutel's layers and a dense network, in one process and in turn.

    A first look, in a minute: m2mkd bench experts --level layer --tokens 394 --dim 384 --hidden 1536 --iters 5

    The exchange between ranks: deepspeed --num_gpus 2 --module m2mkd_ds bench experts --level a2a

    docs/benchmarks.md says how to read the result.

    Args:
        bench: Sizes, distributions, peers and how long to measure.
    """
    bench.check()  # before the imports below, which take seconds
    from m2mkd_ds.bench.experts import run_experts

    if bench.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    in_world(lambda world: run_experts(bench, world))


@bench_app.command
def loader(bench: tyro.conf.OmitArgPrefixes[LoaderBench]) -> None:
    """Measure the input pipeline against plain webdataset, timm's reader and the decoder alone, on the same shards and in turn.

    A first look, in half a minute: m2mkd bench loader --quick

    docs/benchmarks.md says how to read the result.

    Args:
        bench: Shards, batch, workers and how often to measure.
    """
    bench.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench loader measures one process and its workers; start it without the launcher: m2mkd bench loader")
    # Before torch starts its threads: every reader then works with one thread a process, as loader workers do.
    os.environ["OMP_NUM_THREADS"] = "1"
    from m2mkd_ds.bench.loader import run_loader

    setup_logging()
    out(run_loader(bench))


@bench_app.command
def teacher(bench: tyro.conf.OmitArgPrefixes[TeacherBench]) -> None:
    """Measure how a teacher's outputs reach a trainer: shared memory and Arrow Flight against raw sockets, gloo and plain Flight, in turn.

    A first look, in half a minute: m2mkd bench teacher --quick

    docs/benchmarks.md says how to read the result.

    Args:
        bench: The batch, the ways, the training step and how often to measure.
    """
    bench.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench teacher starts its other process itself; start it without the launcher: m2mkd bench teacher")
    os.environ["OMP_NUM_THREADS"] = "1"  # the process that serves inherits it
    from m2mkd_ds.bench.teacher import run_teacher

    setup_logging()
    out(run_teacher(bench))


@bench_app.command
def checkpoint(bench: tyro.conf.OmitArgPrefixes[CheckpointBench]) -> None:
    """Measure how long saving holds training up: our commit, in line and asynchronous, and torch's ways, in turn.

    A first look, in half a minute: m2mkd bench checkpoint --quick

    docs/benchmarks.md says how to read the result.

    Args:
        bench: Size of the state, peers, disk and how often to measure.
    """
    bench.check()
    from m2mkd_ds.bench.checkpoint import run_checkpoint

    in_world(lambda world: run_checkpoint(bench, world))


@bench_app.command
def scaling(bench: tyro.conf.OmitArgPrefixes[ScalingBench]) -> None:
    """Measure weak scaling of the training step on CPU ranks of this host: images a second, efficiency, time inside collectives.

    A first look, in less than a minute: m2mkd bench scaling --quick

    It starts its jobs itself, one after the other. One number of ranks alone: deepspeed --num_gpus 2 --module m2mkd_ds bench scaling

    docs/benchmarks.md says how to read the result.

    Args:
        bench: Ranks, layouts, sizes and how long to measure.
    """
    bench.check()
    from m2mkd_ds.cli.bench_scaling import run_in_job, run_jobs

    if int(os.environ.get("WORLD_SIZE", "0")):
        run_in_job(bench)
    else:
        setup_logging()
        out(run_jobs(bench))

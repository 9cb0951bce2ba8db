"""`m2mkd bench ...`: measurements against other projects."""

from __future__ import annotations

import os
from typing import Literal

import tyro

from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.cli.app import app, in_world


@app.command
def bench(what: tyro.conf.Positional[Literal["experts"]], /, *, options: tyro.conf.OmitArgPrefixes[ExpertBench]) -> None:
    """Measure expert compute against DeepSpeed's and Tutel's layers and a dense network, in one process and in turn.

    A first look, in a minute: m2mkd bench experts --level layer --tokens 394 --dim 384 --hidden 1536 --iters 5

    The exchange between ranks: deepspeed --num_gpus 2 --module m2mkd_ds bench experts --level a2a

    docs/benchmarks.md says how to read the result.

    Args:
        what: experts: throughput of expert compute.
        options: Sizes, distributions, peers and how long to measure.
    """
    options.check()  # before the imports below, which take seconds
    from m2mkd_ds.bench.experts import run_experts

    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    in_world(lambda world: run_experts(options, world))

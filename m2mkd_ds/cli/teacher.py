"""`m2mkd teacher-server` and `m2mkd teacher-export`: the teacher's outputs for trainers elsewhere, and for runs to come."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2mkd_ds.cli.app import Overrides, app, out
from m2mkd_ds.cli.resolve import resolve
from m2mkd_ds.logs import setup_logging
from m2mkd_ds.planner.teacher_plan import Cluster
from m2mkd_ds.teacher.server.options import ServerOptions


# `help` is what `m2mkd --help` lists; `main` sends the verb's own words past it, so that its --help says everything.
@app.command(name="teacher-server", help="Serve a teacher's hidden states and logits to trainers.")
def teacher_server(
    *,
    recipe: str = "",
    config: Path | None = None,
    run_dir: str = "",
    pair: str = "all",
    plan: bool = False,
    server: tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[ServerOptions]],
    cluster: tyro.conf.OmitArgPrefixes[Cluster],
    set: Overrides = (),
) -> None:
    """Serve hidden states and teacher logits to trainers on this host or elsewhere, until SIGTERM.

    On one host: m2mkd teacher-server --config RUN/config.yaml --listen unix:/tmp/teacher.sock

    and the trainers: deepspeed --module m2mkd_ds train --phase m2mkd --config RUN/config.yaml --set teacher.feed=shm
    teacher.endpoints=[unix:/tmp/teacher.sock]

    Over a network: m2mkd teacher-server --config RUN/config.yaml --listen 0.0.0.0:8815 --tls-cert s.pem --tls-key s.key --client-ca ca.pem
    --token-file token

    What would it cost, before anything is started: m2mkd teacher-server --recipe vmoe_base_in1k --plan

    The run's meta model and teacher modules must be there (phases pretrain_meta and split). docs/teacher_server.md tells all of it.

    Args:
        recipe: Name of a recipe (see `m2mkd recipes`). This or --config.
        config: Resolved config of a run (RUN/config.yaml). This or --recipe.
        run_dir: Run folder; by default the one that config.yaml lies in, or the recipe's name under runs/.
        pair: Teaching pairs to serve: `all`, or numbers such as 0,2.
        plan: Print what the teacher side costs (operations, bytes a second, servers for each student GPU) and stop.
        server: Addresses, security and bounds.
        cluster: What --plan reckons with.
        set: Override config fields; data.num_workers says how many processes decode.
    """
    resolved = resolve(config, recipe, run_dir, set)
    if plan:
        from m2mkd_ds.planner.teacher import plan_teacher
        from m2mkd_ds.planner.teacher_text import format_plan

        out(format_plan(plan_teacher(resolved, cluster)))
        return
    server.check()
    from m2mkd_ds.train.teacher.serve import serve

    setup_logging()
    serve(resolved, server, pair)


@app.command(name="teacher-export", help="Store a teacher's logits in files, for teacher.feed=replay.")
def teacher_export(
    *,
    out_dir: Annotated[Path, tyro.conf.arg(name="out")],
    recipe: str = "",
    config: Path | None = None,
    run_dir: str = "",
    pair: str = "all",
    ranks: int = 0,
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
    set: Overrides = (),
) -> None:
    """Store the teacher's logits for a whole phase m2mkd, for runs with teacher.feed=replay.

    m2mkd teacher-export --config RUN/config.yaml --out logits

    and then: m2mkd pipeline --config OTHER/config.yaml --set teacher.feed=replay teacher.replay=logits

    Worth it where several runs share a teacher, data, seed and augmentation. A stopped export goes on by the same command.

    Args:
        out_dir: Folder to write.
        recipe: Name of a recipe (see `m2mkd recipes`). This or --config.
        config: Resolved config of a run (RUN/config.yaml). This or --recipe.
        run_dir: Run folder; by default the one that config.yaml lies in, or the recipe's name under runs/.
        pair: Teaching pairs to store: `all`, or numbers such as 0,2.
        ranks: Ranks of the training to come, of which the length of the phase and its micro-batches follow; 0: launch.num_gpus, or 1.
        dtype: fp16, bf16 or fp32 (with fp32, training is bit for bit the one with the teacher at hand).
        set: Override config fields.
    """
    from m2mkd_ds.train.teacher.export import export

    setup_logging()
    out(export(resolve(config, recipe, run_dir, set), out_dir, pairs=pair, ranks=ranks, dtype=dtype))

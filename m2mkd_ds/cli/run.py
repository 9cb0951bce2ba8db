"""The verbs of a run's making: recipes, train, pipeline; and the two nodes of the DAG whose rooms no room below may import."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from m2mkd_ds.cli.app import Overrides, app, out
from m2mkd_ds.cli.resolve import ensure_shards, resolve, with_ds_config
from m2mkd_ds.cli.results import print_results
from m2mkd_ds.config import PHASES, apply_overrides, dump
from m2mkd_ds.distributed.start.launched import launched_rank
from m2mkd_ds.logs import setup_logging

if TYPE_CHECKING:
    from m2mkd_ds.train.context import RunContext


@app.command
def recipes(name: tyro.conf.Positional[str] = "", /, *, set: Overrides = ()) -> None:
    """List the recipes, or print one: what it does, and every config field with its value.

    Args:
        name: Recipe to print; empty lists them all.
        set: Override config fields before printing.
    """
    from m2mkd_ds.recipes import RECIPES, get_recipe

    if not name:
        width = max(map(len, RECIPES))
        for key, recipe in RECIPES.items():
            out(f"{key:{width}}  {(recipe.__doc__ or '').splitlines()[0]}")
        return
    config = apply_overrides(get_recipe(name), list(set))
    out(f"{RECIPES[name].__doc__}\n\n{dump(config)}")


@app.command
def train(
    *,
    phase: str,
    config: Path | None = None,
    recipe: str = "",
    run_dir: str = "",
    pair: str = "all",
    set: Overrides = (),
) -> None:
    """Train one phase; start it with the launcher: deepspeed --num_gpus 2 --module m2mkd_ds train --config RUN/config.yaml --phase m2mkd.

    Args:
        phase: pretrain_meta | modular_train | assemble_finetune | m2mkd | end_to_end | baseline; several, comma-separated, share
            one launch (split, assemble and evaluate may stand between them).
        config: Resolved config of a run (RUN/config.yaml). This or --recipe.
        recipe: Name of a recipe (see `m2mkd recipes`).
        run_dir: Run folder; by default the one that config.yaml lies in, or the recipe's name under runs/.
        pair: For modular_train and m2mkd: `all`, or pair numbers such as 0,2.
        set: Override config fields.
    """
    names = phase.split(",")
    resolved = with_ds_config(resolve(config, recipe, run_dir, set), names)
    from m2mkd_ds.train.pipeline import write_config
    from m2mkd_ds.train.run_phase import check_phases, run_phases

    check_phases(resolved, names, pair)
    if recipe and launched_rank(os.environ) == 0:
        write_config(resolved)  # so that later verbs and phases find the same config in the run folder
    run_phases(resolved, names, pair)


@app.command
def pipeline(
    *,
    recipe: str = "",
    config: Path | None = None,
    run_dir: str = "",
    modules: int = 0,
    until: str = "",
    only: str = "",
    dry_run: bool = False,
    set: Overrides = (),
) -> None:
    """Run the whole DAG, from images to report; finished nodes are skipped, stopped ones resumed.

    Args:
        recipe: Name of a recipe (see `m2mkd recipes`). This or --config.
        config: Resolved config of a run (RUN/config.yaml). This or --recipe.
        run_dir: Run folder; by default the one that config.yaml lies in, or the recipe's name under runs/.
        modules: Cut teacher and student into this many equal modules, with one meta block each (sets teacher.depths, meta.depths and
            student.depths); 0 keeps the recipe's own.
        until: Stop after this node.
        only: Run just this node (its inputs must be complete).
        dry_run: Print the DAG, what would run or be skipped and why, and the `deepspeed` commands; run nothing. Missing shards
            of a named source are made all the same, because the plan is made from them.
        set: Override config fields.
    """
    from m2mkd_ds.train.pipeline import run_pipeline

    setup_logging()
    resolved = ensure_shards(with_ds_config(resolve(config, recipe, run_dir, set), PHASES))
    runners = {"export": _export_node, "report": _report_node}
    text = run_pipeline(resolved, runners, until=until, only=only, dry_run=dry_run)
    if dry_run:
        out(text)
        return
    if not only:
        print_results(Path(resolved.run_dir))
    html = Path(resolved.run_dir) / "report" / "report.html"
    if html.is_file():
        out(f"report: {html}")


def _report_node(ctx: RunContext) -> None:
    """The DAG's last node: report room and node record meet here, because no room below may import both."""
    from m2mkd_ds.report import build_report
    from m2mkd_ds.train.nodes import find_node, fingerprint, write_done

    started = time.time()
    node = find_node(ctx.config, "report")
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    folder = build_report(ctx.root).parent
    files = [file for file in folder.iterdir() if file.is_file() and file.name != "done.json"]
    write_done(folder, node, ctx.config, print_, files, wall_s=time.time() - started)


def _export_node(ctx: RunContext) -> None:
    from m2mkd_ds.train.exports.export_run import export_node

    export_node(ctx)

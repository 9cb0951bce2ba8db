"""The command line: `m2mkd VERB ...`. Each verb is a small function; heavy rooms are imported inside it, so `--help` is quick.

A pre-parser takes what the `deepspeed` launcher and its users add (`--local_rank N`, `--deepspeed`, `--deepspeed_config FILE`),
tyro parses the rest. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from m2mkd_ds import __version__
from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.config import PHASES, ConfigError, RunConfig, apply_overrides, dump, load
from m2mkd_ds.logs import logger, setup_logging

if TYPE_CHECKING:
    from m2mkd_ds.distributed.world import World
    from m2mkd_ds.train.context import RunContext

app = SubcommandApp()

Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="set", metavar="KEY=VALUE", help="Override config fields, for example m2mkd.lr=1e-3 student.depths='[2,2]'."),
]


def out(text: str) -> None:
    """Print a result (logs go to stderr)."""
    sys.stdout.write(text + "\n")


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
def shards(
    action: tyro.conf.Positional[Literal["write"]],
    /,
    *,
    source: Literal["digits", "fashion_mnist", "image_folder"],
    out_dir: Annotated[Path, tyro.conf.arg(name="out")],
    path: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Make webdataset shards with an index: OUT/train and OUT/validation.

    Args:
        action: write: make the shards; complete folders are kept.
        source: digits (scikit-learn), fashion_mnist, or image_folder (needs --path).
        out_dir: Folder to write into.
        path: For image_folder: the folder of class folders; for fashion_mnist: a local copy of its .gz files.
        cache: Where downloaded originals are kept (default OUT/download).
    """
    from m2mkd_ds.data.sources import make_source

    setup_logging()
    for index in make_source(source, out_dir, path=path, cache=cache):
        out(f"{index.folder}: {index.num_samples} images, {index.num_classes} classes, fingerprint {index.fingerprint[:16]}")


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
    resolved = _with_ds_config(_resolve(config, recipe, run_dir, set), names)
    from m2mkd_ds.train.pipeline import write_config
    from m2mkd_ds.train.run_phase import check_phases, run_phases

    check_phases(resolved, names)
    if recipe and os.environ.get("RANK", "0") == "0":
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
        dry_run: Print the DAG, what would run or be skipped and why, and the `deepspeed` commands; run nothing.
        set: Override config fields.
    """
    from m2mkd_ds.train.pipeline import run_pipeline

    setup_logging()
    resolved = _ensure_shards(_with_ds_config(_resolve(config, recipe, run_dir, set), PHASES))
    runners = {"export": _export_node, "report": _report_node}
    text = run_pipeline(resolved, runners, until=until, only=only, dry_run=dry_run)
    if dry_run:
        out(text)
        return
    if not only:
        _print_results(Path(resolved.run_dir))
    html = Path(resolved.run_dir) / "report" / "report.html"
    if html.is_file():
        out(f"report: {html}")


@app.command(name="eval")
def evaluate(path: tyro.conf.Positional[Path], /, *, validation: Path | None = None, batch_size: int = 256) -> None:
    """Evaluate on every validation image exactly once: a run (all its models), one weights file of a run, or an exported folder.

    Under the launcher the images are shared out over the ranks: deepspeed --num_gpus 2 --module m2mkd_ds eval RUN.

    Args:
        path: Run folder (holds config.yaml), a .safetensors file in it, or an exported Hugging Face folder (holds config.json).
        validation: Shards to use instead of the run's own (the run's results stay as they are); needed for an exported folder.
        batch_size: Images a forward pass, for an exported folder.
    """
    setup_logging()
    if path.suffix == ".safetensors" and path.is_file():
        from m2mkd_ds.train.evaluate_weights import evaluate_weights

        _in_world(lambda world: evaluate_weights(path, world, validation))
    elif (path / "config.yaml").is_file():
        config = replace(load(path / "config.yaml"), run_dir=str(path.resolve()))
        if validation is None:
            from m2mkd_ds.train.run_phase import run_phases

            run_phases(config, ["evaluate"])
            _print_results(path)
        else:
            _evaluate_elsewhere(replace(config, data=replace(config.data, validation=str(validation.resolve()))))
    elif (path / "config.json").is_file():
        from m2mkd_ds.train.evaluate_export import evaluate_export

        if validation is None:
            raise ConfigError("eval of an exported folder needs --validation SHARDS (a folder with index.json)")
        _in_world(lambda world: evaluate_export(path, validation, batch_size, world))
    else:
        raise ConfigError(
            f"{path}: neither a run folder (config.yaml), nor a .safetensors file of one, nor an exported folder (config.json)"
        )


def _evaluate_elsewhere(config: RunConfig) -> None:
    """All models of a run on other shards than its own; nothing is written."""
    from m2mkd_ds.report import format_table
    from m2mkd_ds.train.context import open_run
    from m2mkd_ds.train.evaluate_run import score_run

    _in_world(lambda world: format_table(score_run(open_run(config, world))[1]))


def _in_world(work: Callable[[World], str]) -> None:
    """Join the job (one rank without a launcher), do the work on all ranks, print its text from rank 0."""
    from m2mkd_ds.distributed.world import init_world, shutdown

    world = init_world()
    setup_logging(world.rank)
    text = work(world)
    if world.is_main:
        out(text)
    shutdown()


@app.command
def export(
    run: tyro.conf.Positional[Path],
    /,
    *,
    out_dir: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Write the final student as a Hugging Face folder that loads with trust_remote_code=True.

    Args:
        run: Run folder.
        out_dir: Target folder; RUN/export/model by default.
        dtype: The dtype of the stored weights.
    """
    from m2mkd_ds.train.export_run import export_run

    setup_logging()
    config = replace(load(run / "config.yaml"), run_dir=str(run.resolve()))
    out(str(export_run(config, out_dir or run / "export" / "model", dtype=dtype)))


@app.command
def report(run: tyro.conf.Positional[Path], /) -> None:
    """Build RUN/report (HTML, Markdown, JSON) from what the run has produced so far.

    Args:
        run: Run folder.
    """
    from m2mkd_ds.report import build_report

    setup_logging()
    html = build_report(run)
    _print_results(run)
    out(f"report: {html.resolve()}")


@app.command(name="import")
def import_checkpoint(
    sources: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    out_file: Annotated[Path, tyro.conf.arg(name="out")],
    depths: tuple[int, ...] = (),
    stage: int | None = None,
) -> None:
    """Convert a checkpoint of the m2mKD authors or of Deep Incubation to canonical safetensors. Runs no code of the file.

    Args:
        sources: Their .pth file (whole model, model_stages list, split modules, one student stage), or one file a module.
        out_file: The .safetensors file to write.
        depths: Blocks per stage of the whole model, for example 6 6 6 6, where the file does not tell.
        stage: Which stage a single-stage file is.
    """
    from m2mkd_ds.checkpoint.imports import convert_legacy

    setup_logging()
    source = sources[0] if len(sources) == 1 else list(sources)
    out(f"{out_file}: {convert_legacy(source, out_file, depths=depths or None, stage=stage)}")


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
    _in_world(lambda world: run_experts(options, world))


@app.command
def doctor() -> None:
    """Say what this machine has: versions, devices, precision, optional parts and why they are absent."""
    from m2mkd_ds.train.doctor import describe_machine

    out(describe_machine())


def _print_results(run: Path) -> None:
    """The closing table, from rank 0 only."""
    from m2mkd_ds.report import format_table

    results = run / "evaluate" / "results.json"
    if results.is_file() and os.environ.get("RANK", "0") == "0":
        out(format_table(json.loads(results.read_text())))


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
    from m2mkd_ds.train.export_run import export_node

    export_node(ctx)


def _resolve(config: Path | None, recipe: str, run_dir: str, overrides: Sequence[str]) -> RunConfig:
    """The run's config: a file or a recipe, then --set, then the run folder; paths made absolute.

    A `config.yaml` belongs to the folder that it lies in, so a run folder that was moved or copied goes on by itself.
    """
    from m2mkd_ds.recipes import get_recipe

    if (config is None) == (not recipe):
        raise ConfigError("give either --recipe NAME (see `m2mkd recipes`) or --config RUN/config.yaml")
    resolved = load(config) if config is not None else get_recipe(recipe)
    resolved = apply_overrides(resolved, list(overrides))
    home = config.parent if config is not None and config.name == "config.yaml" else resolved.run_dir
    folder = Path(run_dir or home or f"runs/{resolved.name}").resolve()
    data = resolved.data
    if not data.train and not data.validation and data.source:
        shards = folder.parent / "shards" / data.source
        data = replace(data, train=str(shards / "train"), validation=str(shards / "validation"))
    else:
        data = replace(data, train=_absolute(data.train), validation=_absolute(data.validation))
    teacher = resolved.teacher
    if teacher.weights not in ("", "timm"):
        teacher = replace(teacher, weights=_absolute(teacher.weights))
    return replace(resolved, run_dir=str(folder), data=data, teacher=teacher)


def _cut_evenly(config: RunConfig, modules: int) -> RunConfig:
    """Equal stages for any teacher. Raises ValueError, with an uneven split to copy, when the blocks do not divide."""
    from m2mkd_ds.distill.pairs import even_depths
    from m2mkd_ds.models.vit import VitArch, num_blocks

    teacher, student = config.teacher, config.student
    blocks = num_blocks(VitArch(teacher.arch, dict(teacher.arch_args), config.data.num_classes, config.data.image_size))
    return replace(
        config,
        teacher=replace(teacher, depths=even_depths(blocks, modules, "teacher.depths")),
        meta=replace(config.meta, depths=(1,) * modules),
        student=replace(student, depths=even_depths(sum(student.depths), modules, "student.depths")),
    )


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def _ensure_shards(config: RunConfig) -> RunConfig:
    """Make the shards of a recipe's named source when they are not there yet."""
    home = Path(config.data.train).parent
    if config.data.source and not (Path(config.data.train) / "index.json").is_file():
        from m2mkd_ds.data.sources import make_source

        logger.info("making shards of %s in %s", config.data.source, home)
        make_source(config.data.source, home, cache=None)
    return config


def _with_ds_config(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Apply `--deepspeed_config FILE` to the training phases at hand."""
    file = os.environ.pop("M2MKD_DS_CONFIG", "")
    owners = {"end_to_end" if name == "baseline" else name for name in names if name in PHASES}
    return replace(config, **{owner: replace(getattr(config, owner), ds_config=file) for owner in owners}) if file else config


def take_launcher_flags(argv: Sequence[str]) -> list[str]:
    """Remove the flags that the launcher and DeepSpeed's users add; what they say goes to the environment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank", "--local-rank", type=int)
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", default="")
    known, rest = parser.parse_known_args(list(argv))
    if known.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(known.local_rank))
    if known.deepspeed_config:
        os.environ["M2MKD_DS_CONFIG"] = str(Path(known.deepspeed_config).resolve())
    return rest


def join_overrides(argv: Sequence[str]) -> list[str]:
    """`--set a=1 --set b=2` -> `--set a=1 b=2` at the end: the parser alone would keep the last --set and forget the others."""
    rest: list[str] = []
    assignments: list[str] = []
    inside = first = False  # behind --set; the very next word belongs to it even without `=`, to be refused as an override
    for word in argv:
        if word == "--set":
            inside = first = True
        elif word.startswith("--set="):
            assignments.append(word.removeprefix("--set="))
            inside = True
        elif inside and not word.startswith("-") and (first or "=" in word):
            assignments.append(word)
            first = False
        else:
            rest.append(word)
            inside = first = False
    return [*rest, "--set", *assignments] if assignments else rest


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `m2mkd` and `python -m m2mkd_ds`."""
    arguments = join_overrides(take_launcher_flags(sys.argv[1:] if argv is None else argv))
    if arguments[:1] == ["--version"]:
        out(__version__)
        return
    try:
        app.cli(
            prog="m2mkd",
            description="Module-to-module distillation (m2mKD) of a ViT into a sparse V-MoE.",
            args=arguments,
        )
    except (ConfigError, ValueError, FileNotFoundError) as err:
        # One clear sentence for what a user can cause; anything else keeps its traceback.
        if os.environ.get("M2MKD_DEBUG"):
            raise
        sys.stderr.write(f"m2mkd: {err}\n")
        sys.exit(2)
    except RuntimeError as err:
        from m2mkd_ds.train.launch import LaunchError

        if not isinstance(err, LaunchError):
            raise
        # The failed job has told its own reason above.
        sys.stderr.write(f"m2mkd: {err}\n")
        sys.exit(1)

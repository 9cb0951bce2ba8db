"""The verbs that use what a run has made: eval, report, import; and doctor, for what this machine has."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2mkd_ds.cli.app import NONE_GIVEN, app, in_world, out
from m2mkd_ds.config import ConfigError, RunConfig, load
from m2mkd_ds.distributed.start.launched import launched_rank
from m2mkd_ds.logs import setup_logging


@app.command(name="eval")
def evaluate(
    path: tyro.conf.Positional[Path],
    /,
    *,
    validation: str = "",
    batch_size: int = 256,
    device_map: Literal["", "auto"] = "",
    max_memory: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEVICE=SIZE", help_behavior_hint=NONE_GIVEN)] = (),
) -> None:
    """Evaluate on every validation image exactly once: a run (all its models), one weights file of a run, or an exported folder.

    Under the launcher the images are shared out over the ranks: deepspeed --num_gpus 2 --module m2mkd_ds eval RUN.

    Args:
        path: Run folder (holds config.yaml), a .safetensors file in it, or an exported Hugging Face folder (holds config.json).
        validation: Shards (folder or URL) to use instead of the run's own, whose results stay as they are; needed for an exported folder.
        batch_size: Images a forward pass, for an exported folder.
        device_map: auto: spread an exported folder's model over all GPUs, the CPU and the disk of this host.
        max_memory: With --device-map: the most that each device may hold, for example 0=10GB cpu=4GB; else what is free.
    """
    setup_logging()
    if (device_map or max_memory) and not (path / "config.json").is_file():
        raise ConfigError(f"--device-map and --max-memory are for an exported folder, and {path} is none; export the run first")
    if max_memory and not device_map:
        raise ConfigError("--max-memory says how --device-map auto spreads a model; give both")
    if path.suffix == ".safetensors" and path.is_file():
        from m2mkd_ds.train.evaluation.of_weights import evaluate_weights

        in_world(lambda world: evaluate_weights(path, world, validation))
    elif (path / "config.yaml").is_file():
        config = replace(load(path / "config.yaml"), run_dir=str(path.resolve()))
        if not validation:
            from m2mkd_ds.train.run_phase import run_phases

            run_phases(config, ["evaluate"])
            print_results(path)
        else:
            from m2mkd_ds.data.remote.addresses import absolute

            _evaluate_elsewhere(replace(config, data=replace(config.data, validation=absolute(validation))))
    elif (path / "config.json").is_file():
        from m2mkd_ds.checkpoint.big_models import parse_max_memory
        from m2mkd_ds.train.evaluation.of_export import evaluate_export

        if not validation:
            raise ConfigError("eval of an exported folder needs --validation SHARDS (a folder or URL with index.json)")
        limits = parse_max_memory(max_memory) or None
        in_world(lambda world: evaluate_export(path, validation, batch_size, world, max_memory=limits, spread=bool(device_map)))
    else:
        raise ConfigError(
            f"{path}: neither a run folder (config.yaml), nor a .safetensors file of one, nor an exported folder (config.json)"
        )


def _evaluate_elsewhere(config: RunConfig) -> None:
    """All models of a run on other shards than its own; nothing is written."""
    from m2mkd_ds.report import format_table
    from m2mkd_ds.train.context import open_run
    from m2mkd_ds.train.evaluation.of_run import score_run

    in_world(lambda world: format_table(score_run(open_run(config, world))[1]))


@app.command
def report(run: tyro.conf.Positional[Path], /) -> None:
    """Build RUN/report (HTML, Markdown, JSON) from what the run has produced so far.

    Args:
        run: Run folder.
    """
    from m2mkd_ds.report import build_report

    setup_logging()
    html = build_report(run)
    print_results(run)
    out(f"report: {html.resolve()}")


@app.command(name="import")
def import_checkpoint(
    sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")],
    /,
    *,
    out_file: Annotated[Path, tyro.conf.arg(name="out")],
    depths: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint=NONE_GIVEN)] = (),
    stage: int | None = None,
) -> None:
    """Convert a checkpoint of the m2mKD authors or of Deep Incubation to canonical safetensors. Runs no code of the file.

    Args:
        sources: Their .pth file (whole model, model_stages list, split modules, one student stage), or one file a module.
        out_file: The .safetensors file to write.
        depths: Blocks per stage of the whole model, for example 6 6 6 6, where the file does not tell.
        stage: Which stage a single-stage file is.
    """
    from m2mkd_ds.checkpoint.legacy.imports import convert_legacy

    setup_logging()
    source = sources[0] if len(sources) == 1 else list(sources)
    out(f"{out_file}: {convert_legacy(source, out_file, depths=depths or None, stage=stage)}")


@app.command
def doctor(
    *,
    cluster: Path | None = None,
    config: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Say what this machine has: versions, devices, precision, optional parts and why they are absent; or examine a cluster.

    A cluster is examined over ssh, all hosts at once: environment, versions, clocks, devices, network, folders; then a small job is
    started over all of them, which checks an all-reduce and an all-to-all and says how fast they are. Exit code 1 if anything is wrong.

    Args:
        cluster: Hostfile of the cluster to examine instead of this machine.
        config: With --cluster: RUN/config.yaml of a run, whose folder and shards every host must see.
        as_json: With --cluster: print JSON.
    """
    if cluster is None:
        if config or as_json:
            raise ConfigError("doctor: --config and --json belong to --cluster HOSTFILE")
        from m2mkd_ds.train.doctor import describe_machine

        out(describe_machine())
        return
    from m2mkd_ds.train.launching.cluster_doctor.run import diagnose

    setup_logging()
    resolved = replace(load(config), run_dir=str(config.resolve().parent)) if config else None
    found = diagnose(cluster, resolved)
    out(found.as_json() if as_json else found.text())
    if found.problems:
        sys.exit(1)


def print_results(run: Path) -> None:
    """The closing table, from rank 0 only."""
    from m2mkd_ds.report import format_table

    results = run / "evaluate" / "results.json"
    if results.is_file() and launched_rank(os.environ) == 0:
        out(format_table(json.loads(results.read_text())))

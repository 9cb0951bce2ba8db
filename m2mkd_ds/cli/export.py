"""The verb export: a run's model as a Hugging Face folder, and that folder to a hub."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2mkd_ds.cli.app import app, out
from m2mkd_ds.config import ConfigError, load
from m2mkd_ds.logs import setup_logging


@app.command
def export(
    run: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    out_dir: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
    what: Literal["student", "baseline", "assembled"] = "student",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_shard_size: str = "",
    licence: str = "",
    push: str = "",
    private: bool = False,
    revision: str = "main",
    dry_run: bool = False,
) -> None:
    """Write a model of a run as a Hugging Face folder that loads with trust_remote_code=True, and push it if asked.

    Args:
        run: Run folder; with --push also a folder that was exported before.
        target: Target folder; by default RUN/export/model for the student in fp32, else RUN/export/WHAT-DTYPE.
        out_dir: The same as TARGET.
        what: The final student, the same model trained from scratch (baseline), or the student before end_to_end (assembled).
        dtype: The dtype of the stored weights; routers stay fp32.
        max_shard_size: Largest weights file, for example 500MB; by default the run's export.max_shard_size.
        licence: Licence of the weights as the hub spells it, for example apache-2.0; by default the run's export.license.
        push: USER/NAME on the Hugging Face hub to send the folder to, in one commit. The token is `hf auth login`'s, or HF_TOKEN.
        private: Make the repository private if it is made; refuse one that is public.
        revision: Branch to push to; made if it is not there.
        dry_run: With --push: print what would be sent, and neither write nor send anything that stays.
    """
    setup_logging()
    if target is not None and out_dir is not None and target != out_dir:
        raise ConfigError(f"the target folder is given twice: {target} and --out {out_dir}; give one")
    if not push and (private or dry_run or revision != "main"):
        raise ConfigError("--private, --revision and --dry-run say how to push; give --push USER/NAME too")
    if push:
        _check_repo(push)  # before a minute of exporting
    chosen = target or out_dir
    if not (run / "config.yaml").is_file() and (run / "manifest.json").is_file():
        if not push or chosen or what != "student" or dtype != "fp32" or max_shard_size or licence:
            raise ConfigError(f"{run} is an exported folder: it is pushed as it is (--push USER/NAME); all else needs a run folder")
        _push(run, push, private=private, revision=revision, dry_run=dry_run)
        return
    config = replace(load(run / "config.yaml"), run_dir=str(run.resolve()))
    said = config.export
    said = replace(said, max_shard_size=max_shard_size or said.max_shard_size, license=licence or said.license)
    config = replace(config, export=said)

    from m2mkd_ds.train.exports.export_run import export_run

    if dry_run:
        # Where it is pushed from later does not matter: equal input gives equal bytes.
        with tempfile.TemporaryDirectory() as scratch:
            folder = export_run(config, Path(scratch) / "model", what=what, dtype=dtype)
            _push(folder, push, private=private, revision=revision, dry_run=True)
        return
    folder = export_run(config, chosen or default_target(run, what, dtype), what=what, dtype=dtype)
    out(str(folder))
    if push:
        _push(folder, push, private=private, revision=revision, dry_run=False)


def default_target(run: Path, what: str, dtype: str) -> Path:
    """RUN/export/model is the run's own record of its student in fp32; anything else lies beside it."""
    return run / "export" / ("model" if (what, dtype) == ("student", "fp32") else f"{what}-{dtype}")


def _check_repo(repo: str) -> None:
    from m2mkd_ds.checkpoint.hf.push import check_repo

    check_repo(repo)


def _push(folder: Path, repo: str, *, private: bool, revision: str, dry_run: bool) -> None:
    from m2mkd_ds.checkpoint.hf.push import describe, plan_push, push

    plan = plan_push(folder, repo, private=private, revision=revision)
    out(describe(plan) if dry_run else push(plan))

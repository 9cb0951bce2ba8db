"""The verbs that work on checkpoints as files: reshard, consolidate, inspect. They need no launcher, no GPU and no engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2mkd_ds.cli.app import app, out
from m2mkd_ds.logs import setup_logging

Source = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
Target = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


@app.command
def reshard(
    source: Source,
    target: Target,
    /,
    *,
    ep: int,
    dp: int,
    zero: Literal[1, 2, 3] | None = None,
) -> None:
    """Write a checkpoint anew for a cluster of another shape: weights, moments and average bit for bit the same.

    A run does this by itself when it resumes on other ranks; this verb does it beforehand, in the memory of one piece of a tensor.

    Args:
        source: A checkpoint folder (step-00000100), or a phase's folder: then the newest good one.
        target: The new folder; to go on from it, RUN/PHASE/checkpoints/step-00000100 of the run that will.
        ep: Ranks that share the experts of a layer (ep_size); 1 for a model without experts.
        dp: Ranks that hold the same experts. The checkpoint is laid out for ep x dp ranks.
        zero: ZeRO stage to lay it out for; that of the source by default.
    """
    from m2mkd_ds.checkpoint.state.reshard import reshard as reshard_checkpoint

    setup_logging()
    done = reshard_checkpoint(source, target, ep_size=ep, data_size=dp, zero_stage=zero)
    before, after = done.before, done.after
    out(
        f"{done.out}: step {done.step} of {done.source}, laid out for {after.size} ranks (ep {ep} x dp {dp}), ZeRO-{after.zero_stage}; "
        f"it was for {before.size} ranks (ep {before.ep_size} x dp {before.size // before.ep_size}), ZeRO-{before.zero_stage}\n"
        f"{len(after.parameters)} weights with {', '.join(after.kinds)}; {done.bytes / 2**20:,.1f} MiB in {after.size} files"
    )


@app.command
def consolidate(
    source: Source,
    target: Target,
    /,
    *,
    what: Literal["weights", "ema", "all"] = "weights",
    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE", help_behavior_hint="(default: one file)")] = "",
) -> None:
    """Write a checkpoint as one canonical safetensors file, or as shards with an index.

    Args:
        source: A checkpoint folder (step-00000100), or a phase's folder: then the newest good one.
        target: The new file, NAME.safetensors.
        what: The fp32 weights, their moving average, or all: weights, KIND/NAME for moments and average, scalar/step.
        max_shard_size: Cut into NAME-00001-of-00003.safetensors, ... of at most this size, such as 2GB or 500MiB.
    """
    from m2mkd_ds.checkpoint.state.consolidate import consolidate as consolidate_checkpoint
    from m2mkd_ds.checkpoint.state.consolidate import parse_bytes

    setup_logging()
    limit = parse_bytes(max_shard_size) if max_shard_size else None
    done = consolidate_checkpoint(source, target, what=what, max_shard_bytes=limit)
    out(f"step {done.step} of {done.source}: {done.tensors} tensors, {done.bytes / 2**20:,.1f} MiB")
    out("\n".join(str(file) for file in done.files))


@app.command
def inspect(path: tyro.conf.Positional[Path], /, *, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Say what a checkpoint, a weights file, or every checkpoint of a run holds, and which files are damaged (then the exit code is 1).

    Args:
        path: A checkpoint folder, a .safetensors file, or a folder with checkpoints below it (a phase, a run).
        as_json: Print it as JSON.
    """
    from m2mkd_ds.checkpoint.state.describe import as_text, describe

    setup_logging()
    tree = describe(path)
    out(json.dumps(tree, indent=2) if as_json else as_text(tree))
    if tree["damage"]:
        sys.exit(1)

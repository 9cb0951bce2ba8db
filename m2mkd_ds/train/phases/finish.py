"""The end of a phase: weights with their lineage first, done.json last."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.checkpoint.finished import read_done
from m2mkd_ds.checkpoint.saves.retention import prune
from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.distributed.world import barrier
from m2mkd_ds.logs import logger
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.job import Trainee
from m2mkd_ds.train.lineage import lineage
from m2mkd_ds.train.nodes import Node, is_done, withdraw_done, write_done
from m2mkd_ds.train.phases.jobs import result_weights


def finish_trainee(ctx: RunContext, node: Node, trainee: Trainee, facts: dict[str, Any]) -> None:
    """Write the result of a trainee, weights first and done.json last. All ranks call it (fp32 masters are gathered)."""
    tensors = result_weights(trainee)
    if ctx.world.rank == 0:
        weights = trainee.folder / "weights.safetensors"
        withdraw_done(ctx.root / node.name)  # of a node of pairs, the whole node's record too
        withdraw_done(trainee.folder)
        save_weights(weights, tensors, lineage(ctx, node, trainee.pair if node.per_pair else None))
        facts = {"device": device_name(ctx.world.device), **facts}
        write_done(trainee.folder, node, ctx.config, trainee.fingerprint, [weights], **facts)
        _prune(trainee.folder / "checkpoints", ctx.config.checkpoint.after_done)
    barrier()


def _prune(checkpoints: Path, after_done: str) -> None:
    """Delete what the config does not keep of a finished phase's checkpoints. The result is safe already, so a failure is a warning."""
    try:
        prune(checkpoints, after_done)
    except OSError as err:
        logger.warning("%s: not all checkpoints could be deleted (%s)", checkpoints, err.strerror)


def device_name(device: torch.device) -> str:
    """What a rank computes on, as the model card says it: the GPU's name, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


PAIR_FACTS = ("steps", "images", "world_size")
"""Numbers of a pair's record that hold for its node too."""


def finish_node(ctx: RunContext, node: Node, print_: str, started: float) -> None:
    """For a node of N pairs: write its own done.json once all pairs are done for this fingerprint.

    The numbers come from the pairs' records, because this launch may have found all of them trained.
    """
    folder = ctx.root / node.name
    files = [folder / f"pair_{pair.index}" / "weights.safetensors" for pair in ctx.pairs]
    if ctx.world.rank == 0 and not unfinished_pairs(ctx, node, print_):
        record = read_done(folder / "pair_0") or {}
        facts = {name: record[name] for name in PAIR_FACTS}
        facts |= {"device": record["device"]} if "device" in record else {}  # records of older versions hold none
        write_done(folder, node, ctx.config, print_, files, wall_s=time.time() - started, **facts)
    barrier()


def unfinished_pairs(ctx: RunContext, node: Node, print_: str) -> list[int]:
    """Pairs of the node whose result for this fingerprint is not there yet."""
    folders = {pair.index: ctx.root / node.name / f"pair_{pair.index}" for pair in ctx.pairs}
    return [
        index
        for index, folder in folders.items()
        if not is_done(folder, node, ctx.config, print_, ctx.world.size) or _has_other_images(ctx, folder)
    ]


def _has_other_images(ctx: RunContext, folder: Path) -> bool:
    """Whether the pair was finished on a number of ranks that gives other images (repeat_mode=deit): pairs of a node share them."""
    done = read_done(folder) or {}
    return ctx.config.data.augment.repeats_as_deit and done.get("world_size") != ctx.world.size

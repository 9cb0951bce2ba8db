"""`m2mkd eval` on an exported folder: its weights in our model, its own preprocessing, any shards of the same classes."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.checkpoint.hf_export import load_exported
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.config import ConfigError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.data.remote.addresses import redact
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from m2mkd_ds.train.evaluate import evaluate
from m2mkd_ds.train.phases.jobs import scored


def evaluate_export(folder: Path, validation: str, batch_size: int, world: World) -> str:
    """Score the folder on the shards (folder or URL) and return the numbers as JSON text.

    An export says nothing about how to reach shards: remote ones are read with the defaults of `Access` (no cache, no `pipe:`).
    Raises ConfigError when the class counts differ.
    """
    exported = load_exported(folder)
    index = ShardIndex.load(validation, Access())
    if index.num_classes != exported.arch.num_classes:
        raise ConfigError(f"{redact(validation)} has {index.num_classes} classes and the model in {folder} has {exported.arch.num_classes}")
    model = VisionMoE(exported.arch, StageSpan.whole(exported.arch.num_blocks), stitches=exported.stitches, seed=None)
    load_exact(model, exported.tensors)
    model.to(world.device).eval()

    loader = EvalLoader(index, replace(exported.data, num_workers=0), batch_size=batch_size, rank=world.rank, world=world.size)
    with closing(loader):
        scores = evaluate(lambda x: x, {"model": scored(model)}, loader, world, num_images=index.num_samples, dtype=torch.float32)
    return json.dumps(scores["model"].summary(), indent=2)

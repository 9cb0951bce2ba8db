"""`m2mkd eval` on an exported folder: its weights in our model, its own preprocessing, any shards of the same classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.checkpoint.big_models import Device, load_big_model
from m2mkd_ds.checkpoint.student_files import open_student
from m2mkd_ds.config import ConfigError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.data.remote.addresses import redact
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.distributed.world import World
from m2mkd_ds.train.evaluation.evaluate import evaluate
from m2mkd_ds.train.phases.jobs import scored


def evaluate_export(
    folder: Path,
    validation: str,
    batch_size: int,
    world: World,
    *,
    max_memory: Mapping[Device, int | str] | None = None,
    spread: bool = False,
) -> str:
    """Score the folder on the shards (folder or URL) and return the numbers as JSON text.

    `spread`: over all devices of one process, and the disk, within `max_memory` (see `load_big_model`); for models that fit on none.

    An export says nothing about how to reach shards: remote ones are read with the defaults of `Access` (no cache, no `pipe:`).
    Raises ConfigError when the class counts differ, and for several ranks that each want all devices.
    """
    student = open_student(folder)
    index = ShardIndex.load(validation, Access())
    if index.num_classes != student.arch.num_classes:
        raise ConfigError(f"{redact(validation)} has {index.num_classes} classes and the model in {folder} has {student.arch.num_classes}")
    if spread and world.size > 1:
        raise ConfigError(f"--device-map spreads the model over all devices of one process, and {world.size} ranks were started; start one")
    model = load_big_model(student, max_memory=max_memory) if spread else student.build().to(world.device)

    loader = EvalLoader(index, replace(student.data, num_workers=0), batch_size=batch_size, rank=world.rank, world=world.size)
    with closing(loader):
        scores = evaluate(lambda x: x, {"model": scored(model)}, loader, world, num_images=index.num_samples, dtype=torch.float32)
    return json.dumps(scores["model"].summary(), indent=2)

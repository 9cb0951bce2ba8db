"""What the ranks of test_train_kill_resume.py run: one phase on 46 images of 46 classes, so that a label tells which image was used.

    python kill_resume_job.py OUT first            2 ranks: `straight`, `damaged` twice, `unsaved`, then `killed`, which waits for its end
                                                   in step 7
    python kill_resume_job.py OUT NAME WORDS...    `m2mkd WORDS...`, with the batches of the run NAME logged
Every batch that a feed takes is a line of OUT/NAME.RANK.jsonl: slots, labels, and a SHA-256 of each image's pixels and target.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds import cli
from m2mkd_ds.checkpoint.store import StoreError
from m2mkd_ds.config import AugmentConfig, CheckpointConfig, PhaseConfig, RunConfig
from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.distributed.world import World, barrier, init_world
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train import feeds, run_phase
from m2mkd_ds.train.bad_samples import BadDataError
from m2mkd_ds.train.pipeline import write_config

PHASE = "pretrain_meta"
IMAGES = 46
GLOBAL_BATCH = 8
STEPS = 12
"""96 slots: two epochs and four images of the third."""
CHECKPOINT_STEPS = 3
KILLED_IN = 7
"""Slots 56 to 63, in the second epoch; the newest checkpoint is that of step 6."""


def config_of(
    out: Path, name: str, *, shards: str = "shards", num_workers: int = 0, max_bad_samples: int = -1, asynchronous: bool = False
) -> RunConfig:
    """Everything on that could depend on rank, worker or resume: mixing, erasing, drop-path, clipping, accumulation, average."""
    base = get_recipe("tiny")
    phase = PhaseConfig(
        epochs=3.0, max_steps=STEPS, micro_batch_size=2, gradient_accumulation_steps=2, lr=2e-3, lr_batch=0, eps=1e-6, warmup_epochs=0.5,
        clip_grad=0.5, drop_path=0.2, ema_decay=0.5, precision="fp32", ds_config="zero1", eval_epochs=0.0,
        checkpoint_steps=CHECKPOINT_STEPS, log_steps=1,
    )  # fmt: skip
    augment = AugmentConfig(crop_scale=(0.5, 1.0), hflip=0.5, mixup=0.8, cutmix=1.0, random_erase=0.25, label_smoothing=0.1)
    data = replace(
        base.data, augment=augment, num_classes=IMAGES, num_workers=num_workers, max_bad_samples=max_bad_samples,
        train=str(out / shards / "train"), validation=str(out / "shards" / "validation"),
    )  # fmt: skip
    checkpoint = CheckpointConfig(asynchronous=asynchronous, deadline_s=60.0)
    return replace(base, run_dir=str(out / name), data=data, pretrain_meta=phase, checkpoint=checkpoint)


class LoggedLoader(TrainLoader):
    """Writes down what it gives, and stops for ever in the middle of step `stop_in` on rank 0."""

    log = Path()
    stop_in = -1

    def __iter__(self) -> Iterator[ImageBatch]:
        return self._logged(super().__iter__())

    def _logged(self, batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        rank = int(os.environ.get("RANK", "0"))
        with self.log.with_name(f"{self.log.name}.{rank}.jsonl").open("a") as file:
            for batch in batches:
                file.write(json.dumps({"step": batch.step, "rank": rank, "time": time.time(), **_content(batch)}) + "\n")
                file.flush()
                if rank == 0 and batch.step == self.stop_in and batch.micro_step == self.layout.accumulation - 1:
                    self.log.with_name("ready").touch()
                    time.sleep(600)
                yield batch


def _content(batch: ImageBatch) -> dict[str, Any]:
    rows = zip(batch.images_BCHW, batch.targets_BV, strict=True)
    digests = [hashlib.sha256(image.numpy().tobytes() + target.numpy().tobytes()).hexdigest() for image, target in rows]
    return {"slots": batch.slot_ids_B.tolist(), "labels": batch.labels_B.tolist(), "sha256": digests}


def log_as(log: Path, stop_in: int = -1) -> None:
    LoggedLoader.log, LoggedLoader.stop_in = log, stop_in
    feeds.TrainLoader = LoggedLoader  # type: ignore[misc]


def run(config: RunConfig, world: World) -> str:
    """The phase to its end, or the text of the error that all ranks must raise."""
    if world.is_main:
        write_config(config)
    barrier()
    try:
        run_phase.run_in_world(config, world, PHASE)
    except BadDataError as err:
        return str(err)
    return ""


def unsaved(out: Path, world: World) -> str:
    """What is raised when rank 1, and nobody else, cannot write its share of the checkpoint of step 3, in its thread."""
    log_as(out / "unsaved")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))  # its share is larger, all else that it writes is not
    try:
        run(config_of(out, "unsaved", asynchronous=True), world)
    except StoreError as err:
        return str(err)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def first(out: Path) -> None:
    world = init_world()
    log_as(out / "straight")
    run(config_of(out, "straight"), world)
    # Three damaged images: more than two stop every rank, and the same command with a higher cap goes on.
    errors = []
    for cap in (2, 3):
        log_as(out / f"damaged_{cap}")
        config = config_of(out, "damaged", shards="damaged_shards", max_bad_samples=cap)
        errors.append(run(replace(config, checkpoint=replace(config.checkpoint, after_done="last")), world))
    (out / f"errors_{world.rank}.json").write_text(json.dumps(errors))
    (out / f"unsaved_{world.rank}.json").write_text(json.dumps(unsaved(out, world)))
    log_as(out / "killed", KILLED_IN)
    run(config_of(out, "killed", num_workers=1, asynchronous=True), world)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    out, name = Path(words[0]), words[1]
    torch.set_num_threads(1)
    if name == "first":
        first(out)
    else:
        log_as(out / name)
        cli.main(words[2:])


if __name__ == "__main__":
    main()

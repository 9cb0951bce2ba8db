"""What the ranks of test_train_teacher_feeds.py run: phase m2mkd of one run, again and again, with its teacher elsewhere each time.

    python teacher_feeds_job.py OUT prepare                  the teacher's side of OUT/base, and the phase with feed=colocated
    python teacher_feeds_job.py OUT feeds NAME[@PAIRS]=SETTINGS...   the phase in a copy OUT/NAME, with `a=b;c=d`; needs servers

Fields without a dot are those of `teacher`. With gates=1,3 rank 0 stands still before these steps: it makes OUT/at_NAME_STEP and waits for
OUT/go_NAME_STEP.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.config import AugmentConfig, PhaseConfig, RunConfig, TeacherConfig, apply_overrides
from m2mkd_ds.distributed.world import World, barrier, init_world, shutdown
from m2mkd_ds.logs import setup_logging
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.train import feeds, run_phase
from m2mkd_ds.train.phases import jobs
from m2mkd_ds.train.pipeline import write_config

TEACHER_NODES = ("pretrain_meta", "modular_train", "assemble_finetune", "split")
STEPS = 6


def config_of(out: Path, name: str) -> RunConfig:
    """Recipe `tiny` with everything on that a feed could get wrong: mixing, erasing, accumulation, bytes finished on the device."""
    base = get_recipe("tiny")
    short = PhaseConfig(max_steps=2, micro_batch_size=8, lr=1e-3, lr_batch=0, precision="fp32", eval_epochs=0.0, checkpoint_steps=100)
    phase = replace(
        short, max_steps=STEPS, micro_batch_size=4, gradient_accumulation_steps=2, clip_grad=0.5, drop_path=0.1, checkpoint_steps=3,
        log_steps=1,
    )  # fmt: skip
    augment = AugmentConfig(crop_scale=(0.5, 1.0), hflip=0.5, mixup=0.8, cutmix=1.0, random_erase=0.25, label_smoothing=0.1)
    data = replace(
        base.data, augment=augment, num_workers=0, train=str(out / "shards" / "train"), validation=str(out / "shards" / "validation"),
        decode="fast",
    )  # fmt: skip
    return replace(
        base, run_dir=str(out / name), data=data, pretrain_meta=short, modular_train=short, assemble_finetune=short, m2mkd=phase,
        baseline=False,
    )  # fmt: skip


def run(config: RunConfig, world: World, *nodes: str, pairs: str = "all") -> None:
    if world.is_main:
        write_config(config)
    barrier()
    for node in nodes:
        run_phase.run_in_world(config, world, node, pairs)


class Gated:
    """A feed that stands still before some steps, so that a test can do something to its servers just then."""

    def __init__(self, feed: TeacherFeed, folder: Path, name: str, steps: set[int]) -> None:
        self._feed, self._folder, self._name, self._steps = feed, folder, name, steps

    def batch(self, request: BatchRequest) -> TeacherBatch:
        if request.step in self._steps and request.micro_step == 0:
            (self._folder / f"at_{self._name}_{request.step}").touch()
            deadline = time.monotonic() + 120
            while not (self._folder / f"go_{self._name}_{request.step}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        return self._feed.batch(request)

    def metrics(self) -> dict[str, float]:
        return self._feed.metrics()

    def close(self) -> None:
        self._feed.close()


def gate(out: Path, name: str, steps: set[int], rank: int) -> None:
    """Put the gates into the way of whatever feed the phase makes."""

    def make(plan: feeds.FeedPlan, teacher: TeacherConfig, start_step: int) -> TeacherFeed:
        feed = feeds.make_feed(plan, teacher, start_step)
        return Gated(feed, out, name, steps) if steps and rank == 0 else feed

    jobs.make_feed = make


def run_again(out: Path, word: str, world: World) -> None:
    """The phase once more, in a folder of its own."""
    name, _, settings = word.partition("=")
    name, _, pairs = name.partition("@")
    if world.is_main and not (out / name).exists():
        (out / name).mkdir()
        for node in ("pretrain_meta", "split"):
            shutil.copytree(out / "base" / node, out / name / node)
    barrier()
    given = dict(pair.split("=", 1) for pair in settings.split(";") if pair)
    steps = {int(step) for step in given.pop("gates", "").split(",") if step}
    overrides = [f"{key if '.' in key else f'teacher.{key}'}={value}" for key, value in given.items()]
    gate(out, name, steps, world.rank)
    run(apply_overrides(config_of(out, name), overrides), world, "m2mkd", pairs=pairs or "all")


def main() -> None:
    out, what, *words = [Path(word) if i == 0 else word for i, word in enumerate(w for w in sys.argv[1:] if "local_rank" not in w)]
    assert isinstance(out, Path)
    torch.set_num_threads(1)
    world = init_world()
    setup_logging(world.rank)
    if what == "prepare":
        run(config_of(out, "base"), world, *TEACHER_NODES)
        words = ["colocated="]
    for word in words:
        run_again(out, str(word), world)
    if world.is_main:
        (out / f"{what}.json").write_text(json.dumps(words))
    shutdown()


if __name__ == "__main__":
    main()

"""What the ranks of test_train_teacher_feeds.py run: phase m2mkd of one run, again and again, with its teacher elsewhere each time.

    python teacher_feeds_job.py OUT prepare                  the teacher's side of OUT/base, and the phase with feed=colocated
    python teacher_feeds_job.py OUT feeds NAME=SETTINGS...   the phase in a copy OUT/NAME, with `a=b;c=d` of teacher.*; needs servers
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.config import AugmentConfig, PhaseConfig, RunConfig, apply_overrides
from m2mkd_ds.distributed.world import World, barrier, init_world, shutdown
from m2mkd_ds.logs import setup_logging
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train import run_phase
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


def run(config: RunConfig, world: World, *nodes: str) -> None:
    if world.is_main:
        write_config(config)
    barrier()
    for node in nodes:
        run_phase.run_in_world(config, world, node)


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
        name, _, settings = str(word).partition("=")
        if world.is_main and not (out / name).exists():
            (out / name).mkdir()
            for node in ("pretrain_meta", "split"):
                shutil.copytree(out / "base" / node, out / name / node)
        barrier()
        overrides = [f"teacher.{pair}" for pair in settings.split(";") if pair]
        run(apply_overrides(config_of(out, name), overrides), world, "m2mkd")
    if world.is_main:
        (out / f"{what}.json").write_text(json.dumps(words))
    shutdown()


if __name__ == "__main__":
    main()

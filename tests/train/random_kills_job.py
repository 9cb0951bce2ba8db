"""What the ranks of test_train_random_kills.py run: `m2mkd WORDS...`, ended by SIGKILL to the whole job at one point.

    python random_kills_job.py OUT KIND RANK COUNT WORDS...
KIND none: nobody is killed. batch: when rank RANK takes its COUNT-th micro-batch. file: before the COUNT-th operation of rank RANK on a
file or folder of a checkpoint, whichever thread makes it. Steps begun are lines of OUT/steps.RANK.txt.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds import cli
from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.train import feeds
from tests.train.kill_resume_job import PHASE, config_of

STEPS = 160
CHECKPOINT_STEPS = 2
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def config_for(out: Path, name: str) -> RunConfig:
    """The run of test_train_kill_resume.py, longer, with a checkpoint every other step."""
    base = config_of(out, name)
    return replace(base, **{PHASE: replace(getattr(base, PHASE), epochs=30.0, max_steps=STEPS, checkpoint_steps=CHECKPOINT_STEPS)})


def end_everybody() -> None:
    """Launcher, ranks and helpers are one process group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


class CountedLoader(TrainLoader):
    """Writes down the steps that begin, and ends the job at one of its batches."""

    log = Path()
    last = -1

    def __iter__(self) -> Iterator[ImageBatch]:
        with self.log.open("a") as file:
            for number, batch in enumerate(super().__iter__(), start=1):
                file.write(f"{batch.step}\n")
                file.flush()
                if number == self.last:
                    end_everybody()
                yield batch


def end_at_file_operation(count: int) -> None:
    left = [count]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in FILE_EVENTS and "checkpoints/step-" in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                end_everybody()

    sys.addaudithook(hook)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    out, kind, rank, count = Path(words[0]), words[1], int(words[2]), int(words[3])
    torch.set_num_threads(1)
    own = int(os.environ["RANK"])
    CountedLoader.log = out / f"steps.{own}.txt"
    if own == rank and kind == "batch":
        CountedLoader.last = count
    if own == rank and kind == "file":
        end_at_file_operation(count)
    feeds.TrainLoader = CountedLoader  # type: ignore[misc]
    cli.main(words[4:])


if __name__ == "__main__":
    main()

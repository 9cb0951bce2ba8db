"""What test_train_stopping.py starts: one phase in two ranks with loader workers, which waits at chosen places for the test to strike.

    python stop_job.py OUT NAME PLACE pipeline ...    the verb `pipeline`, whose launched ranks run this script too
    python stop_job.py OUT NAME PLACE train ...       a rank (or, by a launcher, all of them)
PLACE: `free`; `nan:N` (in step N, a loss that is no number); `step:N` (every rank waits before it learns from its last micro-batch of
step N); `evaluate` (behind the first batch of an evaluation). A rank that waits makes OUT/NAME.ready.RANK and goes on when OUT/NAME.go is
there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds import cli
from m2mkd_ds.config import LaunchConfig, RunConfig, WatchConfig
from m2mkd_ds.data.loader import EvalLoader, ImageBatch
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.train import feeds
from m2mkd_ds.train.launching import launch
from m2mkd_ds.train.phases import jobs
from m2mkd_ds.train.steps import StepOutput
from tests.train.kill_resume_job import config_of

RANK = int(os.environ.get("RANK", "0"))
EVAL_STEPS = 5
LIMIT_S = 8.0
"""watch.step_s: longer than any step here, even on a busy machine."""


def stop_config(out: Path, name: str) -> RunConfig:
    """The run of kill_resume_job.py, evaluated every five steps: 0.87 of 46 images are 5 batches of 8."""
    base = config_of(out, name, num_workers=1)
    return replace(
        base, pretrain_meta=replace(base.pretrain_meta, eval_epochs=0.87), launch=LaunchConfig(num_gpus=2),
        watch=WatchConfig(heartbeat_s=0.5, step_s=LIMIT_S, start_s=400.0),
    )  # fmt: skip


def wait_for_the_test(mark: Path, output: Any = None) -> Any:
    mark.with_name(f"{mark.name}.ready.{RANK}").touch()
    deadline = time.monotonic() + 240
    while not mark.with_name(f"{mark.name}.go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return output


def act_in_step(number: int, act: Callable[[StepOutput], StepOutput]) -> None:
    """Before the loop learns from the last micro-batch of a step."""
    original = jobs.make_trainee

    def make_trainee(*args: Any, **options: Any) -> Any:
        trainee = original(*args, **options)
        inner, calls = trainee.step_fn, [0]

        def step(batch: TeacherBatch, log: bool) -> StepOutput:
            calls[0] += 1
            output = inner(batch, log)
            return act(output) if trainee.step + 1 == number and calls[0] % 2 == 0 else output  # two micro-batches a step

        trainee.step_fn = step
        return trainee

    jobs.make_trainee = make_trainee


class SmallEvalLoader(EvalLoader):
    """Ten images a batch; waits behind the first if it has a mark."""

    mark: Path | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "batch_size": 10})

    def __iter__(self) -> Iterator[ImageBatch]:
        return self._waiting(super().__iter__())

    def _waiting(self, batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        for number, batch in enumerate(batches):
            if number == 1 and self.mark is not None:
                wait_for_the_test(self.mark)
            yield batch


def launch_this(words: list[str]) -> None:
    """`deepspeed ... --module m2mkd_ds train ...` becomes `deepspeed ... stop_job.py OUT NAME PLACE train ...`."""
    original = launch.launch_command

    def command(config: LaunchConfig, verb: list[str]) -> list[str]:
        line = original(config, verb)
        at = line.index("--module")
        return [*line[:at], __file__, *words[:3], *line[at + 2 :]]

    launch.launch_command = command


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    out, name, place = Path(words[0]), words[1], words[2]
    torch.set_num_threads(1)
    feeds.EvalLoader = SmallEvalLoader  # type: ignore[misc]
    if words[3] == "pipeline":
        launch_this(words)
    elif place == "evaluate":
        SmallEvalLoader.mark = out / name
    elif place.startswith("step:"):
        act_in_step(int(place.removeprefix("step:")), partial(wait_for_the_test, out / name))
    elif place.startswith("nan:"):
        act_in_step(int(place.removeprefix("nan:")), lambda output: replace(output, loss=output.loss * float("nan")))
    cli.main(words[3:])


if __name__ == "__main__":
    main()

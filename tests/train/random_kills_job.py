"""What test_train_random_kills.py runs: `m2mkd train` on two ranks, ended by SIGKILL at one point after the other, until it is done.

    python random_kills_job.py OUT SEED KILLS       writes OUT/rounds.json: of every round its point, and the steps that rank 0 began

All imports are made once, and the ranks of every round are forked from here: 22 starts by the launcher would take ten times as long. What a
launcher adds is the matter of test_train_kill_resume.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import deepspeed  # noqa: F401  # once, for all forked ranks
import torch

from m2mkd_ds import cli
from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.train import feeds, run_phase  # noqa: F401  # as above
from m2mkd_ds.train.pipeline import write_config
from tests.launching import free_port
from tests.train.kill_resume_job import PHASE, config_of

STEPS = 100
CHECKPOINT_STEPS = 2
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


@dataclass(frozen=True)
class Point:
    """Where a round ends: at the `count`-th micro-batch of a rank, or before its `count`-th operation on files of saves."""

    kind: str
    rank: int
    count: int
    asynchronous: bool


NOWHERE = Point("nowhere", 0, 0, asynchronous=False)


def points(seed: int, kills: int) -> list[Point]:
    """A save is about 20 operations of rank 0 and 6 of rank 1, whichever thread makes them; a step is two micro-batches."""
    draw = random.Random(seed)
    found = []
    for number in range(kills):
        rank, kind = draw.randrange(2), "batch" if number % 4 == 0 else "file"
        count = draw.randint(1, 12) if kind == "batch" else draw.randint(1, (45, 13)[rank])
        found.append(Point(kind, rank, count, asynchronous=number % 2 == 1))
    return found


def config_for(out: Path, name: str) -> RunConfig:
    """The run of test_train_kill_resume.py, longer, with a checkpoint every other step."""
    base = config_of(out, name)
    return replace(base, **{PHASE: replace(getattr(base, PHASE), epochs=30.0, max_steps=STEPS, checkpoint_steps=CHECKPOINT_STEPS)})


def end_everybody() -> None:
    """The ranks of a round, and their helpers, are one process group."""
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
    """Before the count-th one from now on."""
    left = [count]

    def hook(event: str, args: tuple[object, ...]) -> None:
        path = str(args[0]) if args else ""
        # What is written lies in a folder *.tmp; a rename is the commit, or the first act of a deletion. Reading does not count.
        if event in FILE_EVENTS and "checkpoints/step-" in path and (".tmp" in path or event == "os.rename"):
            left[0] -= 1
            if left[0] == 0:
                end_everybody()

    sys.addaudithook(hook)


def rank_process(rank: int, out: Path, name: str, point: Point) -> None:
    """One rank, by the same command in every round."""
    CountedLoader.log = out / f"steps.{rank}.txt"
    if rank == point.rank and point.kind == "batch":
        CountedLoader.last = point.count
    if rank == point.rank and point.kind == "file":
        end_at_file_operation(point.count)
    feeds.TrainLoader = CountedLoader  # type: ignore[misc]
    words = ["train", "--config", str(out / name / "config.yaml"), "--phase", PHASE]
    cli.main([*words, "--set", f"checkpoint.asynchronous={str(point.asynchronous).lower()}"])


def run_round(out: Path, name: str, point: Point) -> dict[str, object]:
    """Both ranks to their end: exit statuses, and the steps that rank 0 began."""
    log = out / "steps.0.txt"
    log.unlink(missing_ok=True)
    port, group, pids = free_port(), 0, []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, group)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )  # fmt: skip
            in_child(lambda rank=rank: rank_process(rank, out, name, point))  # type: ignore[misc]
        group = group or pid
        os.setpgid(pid, group)
        pids.append(pid)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    steps = [int(line) for line in log.read_text().split()] if log.exists() else []
    return {"point": asdict(point), "ended": ended, "steps": steps}


def in_child(work: Callable[[], None]) -> None:
    status = 1
    try:
        work()
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    out, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    for name in ("straight", "killed"):
        write_config(config_for(out, name))
    straight = run_round(out, "straight", NOWHERE)
    rounds = [run_round(out, "killed", point) for point in [*points(seed, kills), replace(NOWHERE, asynchronous=True)]]
    (out / "rounds.json").write_text(json.dumps({"straight": straight, "rounds": rounds}))


if __name__ == "__main__":
    main()

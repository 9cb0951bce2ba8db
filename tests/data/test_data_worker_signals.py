"""Signals that stop a job come to all of its processes: workers go on, and are ended by the loader alone, also when they are stuck."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.worker_start import STOP_SIGNALS
from m2mkd_ds.distributed.watch.processes import Process, parent_of
from tests.processes import descendants, still_there


def loader(folder: Path, index: ShardIndex, steps: int) -> TrainLoader:
    data = DataConfig(num_classes=10, image_size=8, num_workers=1, train=str(folder / "train"), validation=str(folder / "validation"))
    return TrainLoader(
        index, data, seed=0, micro_batch_size=4, accumulation=1, rank=0, world=1, start_step=0, total_steps=steps
    )  # fmt: skip


def family(before: set[int]) -> list[Process]:
    """Processes below this one that were not there before: workers, and the server that forks them if this test has started it."""
    return [process for process in descendants(os.getpid()) if process.pid not in before]


def server_of(worker: Process) -> int:
    parent = parent_of(worker.pid)
    assert parent not in (0, 1, os.getpid())
    return parent


def test_workers_and_their_server_go_on_under_the_signals_that_stop_a_job(digits_folder: Path, digits_train: ShardIndex) -> None:
    before = {process.pid for process in descendants(os.getpid())}
    batches = loader(digits_folder, digits_train, 200)
    received = iter(batches)
    next(received)
    worker = max(family(before), key=lambda process: int(process.started))
    for pid in (worker.pid, server_of(worker)):
        for number in STOP_SIGNALS:
            os.kill(pid, number)
    time.sleep(0.5)
    assert sum(1 for _ in received) == 199
    batches.close()


@pytest.mark.timeout(120)
def test_a_worker_that_is_stuck_is_killed_when_the_loader_closes(digits_folder: Path, digits_train: ShardIndex) -> None:
    before = {process.pid for process in descendants(os.getpid())}
    batches = loader(digits_folder, digits_train, 200)
    received = iter(batches)
    next(received)
    worker = max(family(before), key=lambda process: int(process.started))
    os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 20  # DataLoader alone waits for five seconds, and leaves it
    assert not still_there([worker], 5)


def test_an_interpreter_ends_although_a_loader_with_workers_was_not_closed(digits_folder: Path) -> None:
    script = (
        "import sys\n"
        "from m2mkd_ds.config import DataConfig\n"
        "from m2mkd_ds.data.index import ShardIndex\n"
        "from m2mkd_ds.data.loader import EvalLoader\n"
        "data = DataConfig(num_classes=10, image_size=16, num_workers=1)\n"
        "loader = EvalLoader(ShardIndex.load(sys.argv[1]), data, batch_size=4, rank=0, world=1)\n"
        "next(iter(loader))\n"
        "raise SystemExit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(digits_folder / "validation")], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3, ended.stderr

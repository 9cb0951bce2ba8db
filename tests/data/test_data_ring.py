"""Facts of the memory that workers are lent: no batch is overwritten under anybody's hands, and no worker outlives a killed trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.batch import DeviceWork, WorkerBatch
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader, TrainLoader
from m2mkd_ds.data.ring import Ring, Turn
from m2mkd_ds.data.worker_start import worker_context


def config(num_workers: int, decode: Any = "fast") -> DataConfig:
    return DataConfig(num_classes=10, image_size=16, num_workers=num_workers, decode=decode, augment=AugmentConfig(random_erase=0.5))


def train(index: ShardIndex, data: DataConfig, steps: int = 12) -> TrainLoader:
    return TrainLoader(index, data, seed=3, micro_batch_size=8, accumulation=1, rank=0, world=1, start_step=0, total_steps=steps)


def places(turns: list[Turn]) -> list[int | None]:
    return [None if turn.place is None else turn.place.number for turn in turns]


def test_a_place_is_lent_again_only_when_it_was_given_back() -> None:
    ring = Ring(2, (4, 3), torch.uint8)
    turns = ring.turns(range(6))
    first, second, third = next(turns), next(turns), next(turns)
    assert [turn.batch for turn in (first, second, third)] == [0, 1, 2]
    assert sorted(place for place in places([first, second]) if place is not None) == [0, 1]
    assert third.place is None  # nothing is free: the worker makes memory of its own
    assert first.place is not None and second.place is not None
    ring.give_back(second.place)
    ring.give_back(second.place)  # twice is once
    assert places([next(turns), next(turns)]) == [second.place.number, None]


def test_what_is_given_back_after_the_next_iteration_began_is_not_lent_twice() -> None:
    ring = Ring(1, (4, 3), torch.uint8)
    late = next(ring.turns(range(1))).place
    assert late is not None
    turns = ring.turns(range(3))
    assert places([next(turns)]) == [0]
    ring.give_back(late)  # of the iteration before; the place is in use
    assert places([next(turns)]) == [None]


def test_a_sent_batch_comes_back_with_the_images_of_its_place() -> None:
    ring = Ring(2, (4, 2, 2, 3), torch.uint8)
    turn = next(ring.turns(range(1)))
    assert turn.place is not None
    labels_B = torch.tensor([3, 1, 2])
    ring.images(turn.place, 3).copy_(torch.arange(36, dtype=torch.uint8).view(3, 2, 2, 3))
    work = DeviceWork(flip_B=torch.tensor([True, False, True]))
    batch = WorkerBatch(
        images=ring.images(turn.place, 3), labels_B=labels_B, slot_ids_B=labels_B + 7, step=1, micro_step=0, targets_BV=None, work=work
    )  # fmt: skip
    function, arguments = batch.left_at(turn.place).__reduce__()
    assert not any(isinstance(value, torch.Tensor) for value in arguments[1].values())  # nothing that is sent as a file
    back = function(*arguments)
    assert back.images.numel() == 0
    assert torch.equal(back.fetched().images, torch.arange(36, dtype=torch.uint8).view(3, 2, 2, 3))
    assert torch.equal(back.labels_B, labels_B) and torch.equal(back.slot_ids_B, labels_B + 7) and back.targets_BV is None
    kind, fields = work.__reduce__()
    assert torch.equal(kind(*fields).flip_B, torch.tensor([True, False, True]))


def test_pinning_copies_the_images_and_gives_the_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # What DataLoader's pinning thread does for a GPU; page-locked memory itself needs one.
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    ring = Ring(1, (2, 2, 2, 3), torch.uint8)
    turns = ring.turns(range(3))
    first, second = next(turns), next(turns)
    assert first.place is not None and second.place is None
    ring.images(first.place, 2).fill_(7)
    labels_B = torch.tensor([0, 1])
    sent = WorkerBatch(images=torch.empty(0), labels_B=labels_B, slot_ids_B=labels_B, step=0, micro_step=0, targets_BV=None)
    pinned = sent.left_at(first.place).pin_memory()
    assert pinned.place is None
    third = next(turns)
    assert third.place is not None  # given back
    ring.images(third.place, 2).fill_(9)  # the next batch is written over it
    assert torch.equal(pinned.fetched().images, torch.full((2, 2, 2, 3), 7, dtype=torch.uint8))


def test_batches_that_are_kept_stay_what_they_were(digits_train: ShardIndex) -> None:
    # 24 batches through 3 places, all kept; then what was left in the middle, and a pass after it.
    alone = [batch.images_BCHW.clone() for batch in train(digits_train, config(0), 24)]
    loader = train(digits_train, config(1), 24)
    assert loader._workers._loader.dataset.ring is not None  # type: ignore[attr-defined]
    kept = list(loader)
    broken_off = iter(loader)
    early = [next(broken_off) for _ in range(3)]
    again = list(loader)
    loader.close()
    for batches in (kept, early, again):
        assert all(torch.equal(batch.images_BCHW, images) for batch, images in zip(batches, alone, strict=False))
    assert len(kept) == len(again) == 24


def test_on_the_cpu_pil_batches_are_memory_of_their_own(digits_train: ShardIndex) -> None:
    loader = train(digits_train, config(1, "pil"), 6)
    kept = list(loader)
    loader.close()
    assert len({batch.images_BCHW.untyped_storage().data_ptr() for batch in kept}) == 6
    alone = [batch.images_BCHW for batch in train(digits_train, config(0, "pil"), 6)]
    assert all(torch.equal(batch.images_BCHW, images) for batch, images in zip(kept, alone, strict=True))


def test_the_last_evaluation_batch_is_smaller_than_its_place(digits_validation: ShardIndex) -> None:
    # 359 images: 3 batches of 100 and one of 59.
    for _ in range(2):
        alone = list(EvalLoader(digits_validation, config(0), batch_size=100, rank=0, world=1))
        sent = list(EvalLoader(digits_validation, config(2), batch_size=100, rank=0, world=1))
        assert [len(batch.images_BCHW) for batch in sent] == [100, 100, 100, 59]
        assert all(torch.equal(one.images_BCHW, two.images_BCHW) for one, two in zip(alone, sent, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are spawned elsewhere")
def test_the_server_that_workers_are_forked_from_has_one_thread(digits_train: ShardIndex) -> None:
    assert worker_context().get_start_method() == "forkserver"
    assert next(iter(train(digits_train, config(1)))).images_BCHW.shape == (8, 3, 16, 16)
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert len(os.listdir(f"/proc/{server}/task")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_trainer_that_is_killed(digits_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys
from multiprocessing import forkserver
from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader

if __name__ == "__main__":
    data = DataConfig(num_classes=10, image_size=16, num_workers=1)
    loader = TrainLoader(ShardIndex.load({str(digits_folder / "train")!r}), data, seed=0, micro_batch_size=2, accumulation=1, rank=0,
                         world=1, start_step=0, total_steps=100)
    batches = iter(loader)
    next(batches)
    print(forkserver._forkserver._forkserver_pid, *(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    out = tmp_path / "out"
    with out.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, str(script)], stdout=file, env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in out.read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process is still there 10 s after the trainer was killed"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

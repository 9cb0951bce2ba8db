"""Saving in a thread: the caller is held up by the copy alone, errors come to `wait`, and nothing grows over many saves."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2mkd_ds.checkpoint.saves.async_commit import Committer
from m2mkd_ds.checkpoint.saves.attempt import ALONE, Ranks
from m2mkd_ds.checkpoint.saves.commit import Write, latest_checkpoint
from m2mkd_ds.checkpoint.saves.manifest import FileRecord, hash_files
from m2mkd_ds.checkpoint.store import StoreError
from m2mkd_ds.checkpoint_config import CheckpointConfig
from tests.checkpoint.faulty_disk import folder_in_memory
from tests.left_over import open_files, running


class State:
    """A rank's state of one byte, whose file can be held up or made to fail."""

    def __init__(self) -> None:
        self.value = 0
        self.let_write = threading.Event()
        self.let_write.set()
        self.fails = False

    def copy(self) -> Write:
        value = self.value

        def write(folder: Path) -> dict[str, FileRecord]:
            assert self.let_write.wait(20)
            if self.fails:
                raise OSError("the disk is gone")
            (folder / "state").write_bytes(bytes([value]))
            return {"state": hash_files(folder)["state"]}

        return write


def committer(root: Path, *, asynchronous: bool = True, ranks: Ranks = ALONE, deadline_s: float = 20.0) -> Committer:
    return Committer(root, ranks, CheckpointConfig(asynchronous=asynchronous, deadline_s=deadline_s))


@pytest.fixture
def saves(tmp_path: Path) -> Iterator[Committer]:
    made = committer(tmp_path)
    yield made
    made.close(patience_s=0)


def newest(root: Path) -> tuple[int, int] | None:
    """(step, value)."""
    found = latest_checkpoint(root)
    return None if found is None else (found[1]["step"], (found[0] / "state").read_bytes()[0])


def test_training_goes_on_while_the_copy_is_written_and_the_copy_is_what_is_saved(saves: Committer, tmp_path: Path) -> None:
    state = State()
    state.value, state.let_write = 7, threading.Event()
    saves.save(10, state.copy, {"step": 10})
    state.value = 8  # the next step of training
    assert newest(tmp_path) is None and not saves.has_failed()
    state.let_write.set()
    saves.wait()
    assert newest(tmp_path) == (10, 7)


def test_the_next_save_waits_for_the_one_before(saves: Committer, tmp_path: Path) -> None:
    state = State()
    state.let_write = threading.Event()
    saves.save(10, state.copy, {"step": 10})
    threading.Timer(0.2, state.let_write.set).start()
    saves.save(20, state.copy, {"step": 20})
    assert latest_checkpoint(tmp_path) is not None and (tmp_path / "step-00000010").is_dir()
    saves.wait()
    assert newest(tmp_path) == (20, 0)


@pytest.mark.parametrize("where", ["wait", "save"])
def test_an_error_of_the_thread_is_known_without_waiting_and_raised_by_the_next_call(saves: Committer, tmp_path: Path, where: str) -> None:
    state = State()
    state.fails = True
    saves.save(10, state.copy, {"step": 10})
    deadline = time.monotonic() + 20
    while not saves.has_failed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(StoreError, match="step-00000010: checkpoint not saved .the disk is gone.*same command again"):
        saves.wait() if where == "wait" else saves.save(20, state.copy, {"step": 20})
    assert newest(tmp_path) is None and not saves.has_failed()
    state.fails = False
    saves.save(20, state.copy, {"step": 20})
    saves.wait()
    assert newest(tmp_path) == (20, 0)


def test_in_line_an_error_is_raised_by_the_save_itself_and_no_thread_is_made(tmp_path: Path) -> None:
    state, saves = State(), committer(tmp_path, asynchronous=False)
    before = running()
    saves.save(10, state.copy, {"step": 10})
    assert newest(tmp_path) == (10, 0) and running() <= before
    state.fails = True
    with pytest.raises(StoreError, match="the disk is gone"):
        saves.save(20, state.copy, {"step": 20})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_copy_that_fails_is_raised_and_leaves_nothing(saves: Committer, tmp_path: Path) -> None:
    def copy() -> Write:
        raise MemoryError("no room for a copy")

    with pytest.raises(MemoryError, match="no room for a copy"):
        saves.save(10, copy, {})
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_stops_for_another_error_does_not_wait_long_for_ranks_that_are_gone(tmp_path: Path) -> None:
    before = running()
    saves = committer(tmp_path, ranks=Ranks(0, 2), deadline_s=600.0)  # rank 1 never comes
    saves.save(10, State().copy, {"step": 10})
    assert len(running() - before) == 1
    began = time.monotonic()
    problem = saves.close(patience_s=0.2)
    assert "no part came from ranks [1]" in problem and time.monotonic() - began < 10
    assert running() <= before


def test_a_rank_that_does_not_see_the_commit_in_time_raises_alone(tmp_path: Path) -> None:
    told: list[str] = []

    def tell(value: str) -> str:
        told.append(value)
        return value

    main, state = committer(tmp_path, ranks=Ranks(0, 2, tell)), State()
    other = committer(tmp_path, ranks=Ranks(1, 2, lambda value: told[-1]), deadline_s=0.1)
    state.let_write = threading.Event()
    main.save(10, state.copy, {"step": 10})
    other.save(10, lambda: lambda folder: {}, {})
    with pytest.raises(StoreError, match="not known to be saved, no word from rank 0"):
        other.wait()
    state.let_write.set()
    main.wait()
    assert newest(tmp_path) == (10, 0)
    main.close()
    other.close()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_hundred_saves_and_readings_leave_files_threads_and_memory_as_they_were(memory_path: Path, asynchronous: bool) -> None:
    saves, buffer = committer(memory_path, asynchronous=asynchronous), torch.zeros(1 << 18)  # 1 MiB

    def copy() -> Write:
        buffer.fill_(step)

        def write(folder: Path) -> dict[str, FileRecord]:
            (folder / "state").write_bytes(buffer.numpy().tobytes())
            return {"state": hash_files(folder)["state"]}

        return write

    seen = []
    for step in range(110):
        saves.save(step, copy, {"step": step})
        saves.wait()
        found = latest_checkpoint(memory_path)
        assert found is not None and found[1] == {"step": step}
        if step in (9, 109):
            gc.collect()
            seen.append((len(list(memory_path.rglob("*"))), open_files(), running(), resident_bytes()))
    saves.close()
    assert seen[0][0] == seen[1][0] == 6  # two folders with a file and a manifest each
    assert seen[1][1] <= seen[0][1] and seen[1][2] <= seen[0][2]
    assert seen[1][3] - seen[0][3] < 16 << 20  # a leak of one buffer a save would be 100 MiB

"""The commit protocol: kills at every file operation, failing ranks, damaged files, full disks, retention."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.checkpoint.saves.attempt import Ranks
from m2mkd_ds.checkpoint.saves.commit import Write
from m2mkd_ds.checkpoint.saves.manifest import FileRecord, hash_files, read_manifest
from m2mkd_ds.checkpoint.store import StoreError, commit_checkpoint, latest_checkpoint, save_weights, verify_checkpoint, write_json_atomic
from m2mkd_ds.checkpoint_config import CheckpointConfig
from tests.checkpoint.faulty_disk import folder_in_memory


def writer(value: int) -> Write:
    def write(folder: Path) -> dict[str, FileRecord]:
        (folder / "rank0").mkdir()
        files = {"rank0/optimizer.bin": bytes([value]) * 1000, "weights.bin": bytes([value]) * 50}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return {name: FileRecord(len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}

    return write


def fail(folder: Path) -> dict[str, FileRecord]:
    (folder / "half").write_bytes(b"x")
    raise RuntimeError("enforce fail: file write failed")


def save(root: Path, step: int, value: int, keep: int = 2) -> Path:
    return commit_checkpoint(root, step, writer(value), {"step": step, "value": value}, config=CheckpointConfig(keep_last=keep))


def latest_value(root: Path) -> tuple[int, int] | None:
    """(step, value) of the newest checkpoint, with its bytes checked against the value."""
    found = latest_checkpoint(root)
    if found is None:
        return None
    folder, record = found
    value = record["value"]
    assert (folder / "rank0" / "optimizer.bin").read_bytes() == bytes([value]) * 1000
    assert (folder / "weights.bin").read_bytes() == bytes([value]) * 50
    return record["step"], value


def names(root: Path) -> list[str]:
    return sorted(item.name for item in root.iterdir())


def test_what_is_committed_is_found_again(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    folder = commit_checkpoint(tmp_path / "c", 100, writer(7), {"cursor": (3, 4), "loss": 0.1, "by_step": {2: "b", 10: "a"}})
    assert folder == tmp_path / "c" / "step-00000100" and names(folder) == ["manifest.json", "rank0", "weights.bin"]
    # As JSON gives it back: lists for tuples, text for keys.
    assert latest_checkpoint(tmp_path / "c") == (folder, {"cursor": [3, 4], "loss": 0.1, "by_step": {"2": "b", "10": "a"}})


def test_steps_are_ordered_by_number_and_the_oldest_are_retired(tmp_path: Path) -> None:
    # As text, 99999999 would come after 100000000.
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save(tmp_path, step, step % 200)
    assert names(tmp_path) == ["step-100000000", "step-99999999"] and latest_value(tmp_path) == (100_000_000, 0)
    save(tmp_path, 100_000_001, 1, keep=1)
    assert names(tmp_path) == ["step-100000001"]


def test_a_checkpoint_saved_out_of_order_is_never_retired_itself(tmp_path: Path) -> None:
    save(tmp_path, 200, 1)
    (tmp_path / "step-00000200" / "weights.bin").write_bytes(bytes([9]) * 50)
    save(tmp_path, 150, 2, keep=1)
    assert latest_value(tmp_path) == (150, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights.bin").write_bytes(bytes([2]) * 49 + b"x"), r"weights\.bin: damaged, its SHA-256"),
        (
            lambda f: (f / "rank0" / "optimizer.bin").write_bytes(bytes([2]) * 999),
            r"optimizer\.bin: damaged, it has 999 bytes .* says 1000",
        ),
        (lambda f: (f / "weights.bin").unlink(), r"weights\.bin: missing"),
        (lambda f: (f / "manifest.json").unlink(), r"step-00000020: no manifest\.json"),
        (lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:-40]), r"manifest\.json: damaged"),
        (
            lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"value": 2', '"value": 3')),
            r"manifest\.json: damaged, its content does not match",
        ),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], message: str
) -> None:
    save(tmp_path, 10, 1)
    damage(save(tmp_path, 20, 2))
    with pytest.raises(StoreError, match=message):
        verify_checkpoint(tmp_path / "step-00000020")
    with caplog.at_level(logging.WARNING, "m2mkd_ds"):
        assert latest_value(tmp_path) == (10, 1)
    assert "checkpoint skipped" in caplog.text and "step-00000020" in caplog.text


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink()])
def test_every_file_flipped_shortened_or_deleted_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    together(tmp_path, 5, [part(0), part(1)])
    for name in ("manifest.json", "part0.safetensors", "part1.safetensors"):
        together(tmp_path, 6, [part(0), part(1)])
        caplog.clear()
        damage(tmp_path / "step-00000006" / name)
        with caplog.at_level(logging.WARNING, "m2mkd_ds"):
            found = latest_checkpoint(tmp_path)
        assert found is not None and found[0].name == "step-00000005"
        assert "checkpoint skipped" in caplog.text and "step-00000006" in caplog.text and name in caplog.text
        assert names(tmp_path / "step-00000005") == ["manifest.json", "part0.safetensors", "part1.safetensors"]


def test_only_broken_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 10, 1) / "weights.bin").unlink()
    with pytest.raises(StoreError, match=r"no checkpoint is usable .*weights\.bin: missing.*start again from step 0"):
        latest_checkpoint(tmp_path)


def test_a_half_written_folder_is_not_a_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 10, 1)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000020.tmp")
    assert latest_value(tmp_path) == (10, 1)
    save(tmp_path, 30, 3)
    assert names(tmp_path) == ["step-00000010", "step-00000030"]


@pytest.fixture
def memory_path() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process that ends without any clean-up of Python's; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


FILE_EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "os.chmod",
    "os.listdir",
    "os.scandir",
)


def stop_at(count: int, stop: Callable[[], None]) -> None:
    """Call `stop` just before the count-th file operation of this process (operations of C and Rust code are not seen)."""
    left = [count]

    def hook(event: str, _: object) -> None:
        if event in FILE_EVENTS:
            left[0] -= 1
            if left[0] == 0:
                stop()

    sys.addaudithook(hook)


def cut() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("same_step", [False, True])
def test_interrupted_before_any_file_operation_the_old_or_the_new_checkpoint_is_whole(
    memory_path: Path, caplog: pytest.LogCaptureFixture, same_step: bool
) -> None:
    """One rank, with the clean-up that an exception gets; kills and disk errors: test_checkpoint_commit_faults.py."""
    new = (20, 3) if same_step else (30, 3)
    finished, seen = False, set()
    for count in range(1, 500):
        root = memory_path / str(count)
        save(root, 10, 1)
        save(root, 20, 2)

        def work(root: Path = root, count: int = count) -> None:
            stop_at(count, cut)
            save(root, new[0], new[1])

        finished = in_child(work) == 0
        left = latest_value(root)
        seen.add(left)
        assert left in ((20, 2), new) and not caplog.text, (count, caplog.text)
        for name in names(root):
            if not name.endswith(".tmp"):
                verify_checkpoint(root / name)
        # Neither does a save that fails lose it, whatever it has to clear away.
        with pytest.raises(StoreError, match="enforce fail"):
            commit_checkpoint(root, 40, fail, {})
        assert latest_value(root) == left, count
        # The next save works whatever was left behind, and clears it.
        save(root, 40, 4)
        assert latest_value(root) == (40, 4) and not [name for name in names(root) if not name[5:].isdigit()], (count, names(root))
        assert len(names(root)) == 2
        shutil.rmtree(root)
        caplog.clear()
        if finished:
            break
    # The loop saw both sides of the commit, and ended because no operation was left to stop at.
    assert finished and count > 25 and seen == {(20, 2), new}


def together(root: Path, step: int, writers: list[Write], main_fails: bool = False) -> list[object]:
    """One commit by several ranks (threads); returns each rank's result or exception."""
    barrier, told = threading.Barrier(len(writers), timeout=20), [None]
    results: list[object] = [None] * len(writers)

    def rank(i: int) -> None:
        def broadcast(value: Any) -> Any:
            if i == 0:
                told[0] = value
            barrier.wait()
            return told[0]

        record = {"value": {1, 2}} if main_fails and i == 0 else {"value": i}
        try:
            ranks = Ranks(i, len(writers), broadcast)
            results[i] = commit_checkpoint(root, step, writers[i], record, ranks=ranks, config=CheckpointConfig(deadline_s=5))
        except ValueError as err:
            results[i] = err

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(len(writers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def part(i: int) -> Write:
    def write(folder: Path) -> dict[str, FileRecord]:
        path = folder / f"part{i}.safetensors"
        sha256 = save_weights(path, {"w": torch.full((3,), float(i))})
        return {path.name: FileRecord(path.stat().st_size, sha256)}

    return write


def assert_unchanged(root: Path) -> None:
    """The checkpoint of step 5 alone, and what a failed attempt leaves for the other ranks: its reason, and no manifest."""
    (good, failed) = sorted(root.iterdir())
    assert good.name == "step-00000005" and names(good) == ["manifest.json", "part0.safetensors", "part1.safetensors"]
    assert verify_checkpoint(good) == {"value": 0}
    assert failed.name.endswith(".tmp") and "failed.json" in names(failed) and "manifest.json" not in names(failed)


FOUR = ["manifest.json", *(f"part{i}.safetensors" for i in range(4))]


def test_all_ranks_parts_are_in_the_one_folder(tmp_path: Path) -> None:
    results = together(tmp_path, 5, [part(i) for i in range(4)])
    assert results == [tmp_path / "step-00000005"] * 4 and names(tmp_path / "step-00000005") == FOUR
    # The record is the main rank's.
    assert verify_checkpoint(tmp_path / "step-00000005") == {"value": 0}
    assert read_manifest(tmp_path / "step-00000005")["parts"] == {str(i): [f"part{i}.safetensors"] for i in range(4)}


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failing_rank_is_an_error_on_all_and_changes_nothing(tmp_path: Path, failing: int) -> None:
    together(tmp_path, 5, [part(0), part(1)])
    for step in (5, 6):
        results = together(tmp_path, step, [fail if i == failing else part(7) for i in range(2)])
        assert all(isinstance(result, StoreError) for result in results)
        assert "enforce fail: file write failed" in str(results[failing]) and "MiB are free" in str(results[failing])
        assert "enforce fail: file write failed" in str(results[1 - failing])  # the reason has travelled
        if failing == 1:
            assert f"step-{step:08d}: not saved, rank 1 could not write its part" in str(results[0])
        assert_unchanged(tmp_path)
    together(tmp_path, 6, [part(0), part(1)])
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_main_rank_that_cannot_publish_is_an_error_on_all(tmp_path: Path) -> None:
    together(tmp_path, 5, [part(0), part(1)])
    for step in (5, 6):
        results = together(tmp_path, step, [part(0), part(1)], main_fails=True)
        assert all(isinstance(result, StoreError) and "not plain JSON data" in str(result) for result in results)
        assert_unchanged(tmp_path)


def test_root_that_cannot_be_made_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    results = together(tmp_path / "file", 5, [part(0), part(1)])
    assert all(isinstance(result, StoreError) and "checkpoint not saved" in str(result) for result in results)


def test_two_ranks_with_one_name_are_refused(tmp_path: Path) -> None:
    def write(folder: Path) -> dict[str, FileRecord]:
        (folder / "same.bin").write_bytes(b"abc")
        return {"same.bin": FileRecord(3, hashlib.sha256(b"abc").hexdigest())}

    results = together(tmp_path, 5, [write, write])
    assert all(isinstance(result, StoreError) and "another rank uses, too" in str(result) for result in results)
    assert latest_checkpoint(tmp_path) is None


def test_a_file_that_is_not_as_long_as_its_rank_says_is_not_committed(tmp_path: Path) -> None:
    def lie(folder: Path) -> dict[str, FileRecord]:
        (folder / "short").write_bytes(b"abc")
        return {"short": FileRecord(4, "0" * 64)}

    with pytest.raises(StoreError, match=r"short: damaged, it has 3 bytes"):
        commit_checkpoint(tmp_path, 5, lie, {})
    assert names(tmp_path) == []


def test_a_rank_that_is_never_heard_of_ends_the_save_at_the_deadline(tmp_path: Path) -> None:
    # Rank 0 of two, alone: the broadcast comes back, a part never comes.
    with pytest.raises(StoreError, match=r"not saved, no part came from ranks \[1\] within 0\.1 s"):
        commit_checkpoint(tmp_path, 5, part(0), {}, ranks=Ranks(0, 2), config=CheckpointConfig(deadline_s=0.1))
    (attempt,) = tmp_path.iterdir()
    assert names(attempt) == [".no-rank-has-failed", "failed.json", "part-00000.json"]  # its own file gave back its space
    # And rank 1 of two, when rank 0 has made the folder and died.
    with pytest.raises(StoreError, match="not known to be saved, no word from rank 0 within 0.2 s"):
        (tmp_path / "step-00000006.abc.tmp").mkdir()
        ranks = Ranks(1, 2, lambda _: ("abc", ""))
        commit_checkpoint(tmp_path, 6, part(1), {}, ranks=ranks, config=CheckpointConfig(deadline_s=0.1))


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"rank 1 does not see this folder.*one shared folder"):
        commit_checkpoint(tmp_path, 6, part(1), {}, ranks=Ranks(1, 2, lambda _: ("abc", "")))


def test_full_disk_is_one_clear_error_and_frees_what_was_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.system(f"mount -t tmpfs -o size=256k tmpfs {disk} 2>/dev/null") == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
    works: list[Callable[[Path], object]] = [
        lambda folder: (folder / "a.bin").write_bytes(bytes(1 << 19)),
        lambda folder: torch.save({"w": torch.zeros(1 << 17)}, folder / "a.pt"),
        lambda folder: save_weights(folder / "a.safetensors", {"w": torch.zeros(1 << 17)}),
        lambda folder: write_json_atomic(folder / "a.json", "x" * (1 << 19)),
    ]
    writes: list[Write] = [lambda folder, work=work: work(folder) and hash_files(folder) for work in works]  # type: ignore[misc]
    try:
        save(disk / "run", 10, 1)
        for write in writes:
            for step in (10, 20):
                with pytest.raises(StoreError):
                    commit_checkpoint(disk / "run", step, write, {})
            assert names(disk / "run") == ["step-00000010"] and latest_value(disk / "run") == (10, 1)
        with pytest.raises(
            StoreError, match=r"step-00000020: checkpoint not saved .*MiB are free on that disk; earlier checkpoints are untouched"
        ):
            commit_checkpoint(disk / "run", 20, writes[1], {})
        # Space given back is enough: the run goes on.
        save(disk / "run", 20, 2)
        assert latest_value(disk / "run") == (20, 2)
    finally:
        if mounted:
            assert os.system(f"umount {disk}") == 0
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint step is -1; allowed are steps >= 0"):
        save(tmp_path, -1, 1)

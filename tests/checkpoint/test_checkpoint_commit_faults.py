"""Every change that a save of two ranks makes to the disk goes wrong once, on each rank, in each way, in line and asynchronous.

Each rank is a process of its own with a disk of its own mind (`faulty_disk.py`). Whatever happens, the old checkpoint or the new one loads,
no rank says anything else than what is on the disk, and the next save works.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ds.checkpoint.saves.async_commit import Committer
from m2mkd_ds.checkpoint.saves.attempt import Ranks
from m2mkd_ds.checkpoint.saves.commit import Write, commit_checkpoint, latest_checkpoint, verify_checkpoint
from m2mkd_ds.checkpoint.saves.manifest import FileRecord
from m2mkd_ds.checkpoint.store import StoreError
from m2mkd_ds.checkpoint_config import CheckpointConfig
from tests.checkpoint.faulty_disk import FaultyDisk, folder_in_memory

OLD, NEW = (20, 2), (30, 3)
"""(step, value); there is a checkpoint of step 10, too, which the save of step 30 retires."""
NEVER = 10**9


def writer(rank: int, value: int) -> Write:
    def write(folder: Path) -> dict[str, FileRecord]:
        content = bytes([value]) * (1000 + rank)
        with (folder / f"rank{rank}.bin").open("wb", buffering=0) as file:
            file.write(content)
        return {f"rank{rank}.bin": FileRecord(len(content), hashlib.sha256(content).hexdigest())}

    return write


def both(value: int) -> Write:
    """The files of two ranks, by one."""
    return lambda folder: {**writer(0, value)(folder), **writer(1, value)(folder)}


def value_of(root: Path) -> tuple[int, int]:
    """(step, value) of the newest checkpoint, with every byte checked against the value: never a mix."""
    found = latest_checkpoint(root)
    assert found is not None
    folder, record = found
    for rank in range(2):
        assert (folder / f"rank{rank}.bin").read_bytes() == bytes([record["value"]]) * (1000 + rank)
    return record["step"], record["value"]


@dataclass
class Ended:
    """What became of a rank."""

    status: int
    outcome: str = ""
    changes: list[str] = field(default_factory=list)


def rank_process(rank: int, root: Path, new: tuple[int, int], asynchronous: bool, disk: FaultyDisk, told: tuple[int, int]) -> str:
    """One save as the loop makes it; returns what this rank would tell the loop."""

    def broadcast(value: Any) -> Any:
        if rank == 0:
            os.write(told[1], json.dumps(value).encode())
            return value
        os.close(told[1])
        text = os.read(told[0], 4096)
        assert text, "rank 0 is gone"
        return json.loads(text)

    config = CheckpointConfig(asynchronous=asynchronous, deadline_s=0.4 if disk.fault == "dead" else 20.0)
    committer = Committer(root, Ranks(rank, 2, broadcast), config)
    disk.install()
    try:
        committer.save(new[0], lambda: writer(rank, new[1]), {"step": new[0], "value": new[1]})
        committer.wait()
    except StoreError as err:
        return str(err)
    return "saved"


def save_by_two(root: Path, new: tuple[int, int], asynchronous: bool, disks: tuple[FaultyDisk, FaultyDisk]) -> list[Ended]:
    """Two forked ranks. When one is killed, the launcher's part is played: the other is killed, too."""
    told = os.pipe()
    children = []
    for rank, disk in enumerate(disks):
        answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                outcome = rank_process(rank, root, new, asynchronous, disk, told)
                os.write(answer[1], json.dumps({"outcome": outcome, "changes": disk.changes}).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(answer[1])
        children.append((pid, answer[0]))
    os.close(told[0])
    os.close(told[1])
    ended = {}
    for _ in children:
        pid, status = os.wait()
        ended[pid] = os.waitstatus_to_exitcode(status)
        if ended[pid] == 9:
            for other, _ in children:
                if other not in ended:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
    results = []
    for pid, reader in children:
        with os.fdopen(reader) as file:
            text = file.read()
        results.append(Ended(ended[pid], **json.loads(text)) if text else Ended(ended[pid]))
    return results


@pytest.fixture(scope="module")
def start() -> Iterator[Path]:
    """Two good checkpoints."""
    with folder_in_memory() as folder:
        root = folder / "start"
        for step, value in ((10, 1), OLD):
            commit_checkpoint(root, step, both(value), {"step": step, "value": value})
        yield root


def copy_of(start: Path) -> Path:
    root = start.with_name("case")
    if root.exists():
        shutil.rmtree(root)
    shutil.copytree(start, root)
    return root


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in line", "asynchronous"])
# Nobody can tell the others of a disk that is dead: that takes a deadline each time.
@pytest.mark.parametrize("fault", ["kill", "eio", "enospc", pytest.param("dead", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_change_fails_the_old_or_the_new_checkpoint_is_whole(
    start: Path, caplog: pytest.LogCaptureFixture, rank: int, fault: str, asynchronous: bool
) -> None:
    # The save of the same step takes one turn more: the older copy steps aside, and back on failure.
    new = (OLD[0], NEW[1]) if asynchronous else NEW
    seen, number = set(), -1
    total = len(fault_free(start, new, asynchronous)[rank].changes)
    for number in range(total):
        root = copy_of(start)
        disks = (FaultyDisk(fault, number if rank == 0 else NEVER), FaultyDisk(fault, number if rank == 1 else NEVER))
        ended = save_by_two(root, new, asynchronous, disks)
        found = value_of(root)
        seen.add(found)
        where = (number, [e.outcome for e in ended], ended[rank].changes[number:], sorted(p.name for p in root.iterdir()))
        assert found in (OLD, new), where
        for path in root.iterdir():
            if not path.name.endswith(".tmp"):
                verify_checkpoint(path)
        if fault == "kill":
            assert ended[rank].status == 9, where
        else:
            # What the ranks are told is true, and the same on both.
            assert [e.status for e in ended] == [0, 0], where
            assert {e.outcome == "saved" for e in ended} == {found == new}, where
            assert fault == "dead" or "step-00000020" in where[3]  # an older copy that stepped aside is back
        caplog.clear()
        with caplog.at_level(logging.ERROR):  # that leftovers were removed is no news here
            commit_checkpoint(root, 40, both(4), {"step": 40, "value": 4})
        assert value_of(root) == (40, 4)
        assert sorted(path.name for path in root.iterdir()) == [f"step-{found[0]:08d}", "step-00000040"], where
    # Both sides of the commit were met. It is rank 0's: whether rank 1's last change is before it is a matter of time.
    assert number + 1 == total and (seen == {OLD, new} if rank == 0 else OLD in seen)


def test_nothing_old_goes_when_the_disk_does_not_confirm_the_new_name(start: Path) -> None:
    changes = fault_free(start, NEW, asynchronous=False)[0].changes
    root = copy_of(start)
    ended = save_by_two(root, NEW, False, (FaultyDisk("eio", changes.index("fsync case")), FaultyDisk("eio", NEVER)))
    assert [e.outcome for e in ended] == ["saved", "saved"] and value_of(root) == NEW
    # Step 10 would have been retired.
    assert sorted(path.name for path in root.iterdir()) == ["step-00000010", "step-00000020", "step-00000030"]


def fault_free(start: Path, new: tuple[int, int], asynchronous: bool) -> list[Ended]:
    ended = save_by_two(copy_of(start), new, asynchronous, (FaultyDisk("kill", NEVER), FaultyDisk("kill", NEVER)))
    assert [e.outcome for e in ended] == ["saved", "saved"]
    return ended


def test_the_changes_are_those_of_the_protocol_in_its_order(start: Path) -> None:
    main, other = (e.changes for e in fault_free(start, NEW, asynchronous=True))

    def order(changes: list[str], *names: str) -> None:
        places = [next(i for i, change in enumerate(changes) if change.startswith(name)) for name in names]
        assert places == sorted(places), list(zip(names, places, strict=True))

    # Own files and their names are on the disk before the part says so.
    order(
        other, "create rank1.bin", "write rank1.bin", "fsync rank1.bin", "fsync step-00000030.", "create .part-00001", "rename .part-00001",
    )  # fmt: skip
    assert not [change for change in other if "manifest" in change or change.startswith(("mkdir", "rmdir"))]
    # The manifest is last, then the rename, then its name is forced to the disk, and only then something old is deleted.
    order(
        main, "mkdir step-00000030.", "write rank0.bin", "rename .part-00000", "unlink part-00001", "write .manifest", "fsync .manifest",
        "rename .manifest", "rename step-00000030.", "fsync case", "rename step-00000010", "unlink rank0.bin", "rmdir step-00000010",
    )  # fmt: skip

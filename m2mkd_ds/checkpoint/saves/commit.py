"""The commit protocol for checkpoint folders: what all ranks have written becomes visible at once, or not at all.

    begin        the main rank makes root/step-00000100.<attempt>.tmp and tells its name    the only message between ranks
    write_part   every rank writes its files there, forces them to the disk, and writes part-<rank>.json (names, sizes, SHA-256)
    publish      the main rank collects the parts, writes manifest.json, and renames the folder to root/step-00000100: the commit
    settle       it forces that name to the disk, and only then retires old checkpoints
    await_end    the others look at the folders until they see this attempt's manifest, or that the attempt has failed

All after `begin` may run in a thread of its own (`async_commit.py`): ranks agree through the folder, never by a collective. A rank that
fails says why in its part. On a disk that takes no more files it removes the token file instead, since removing works on a full disk, too.
The attempt's name in the manifest tells a rank that a folder is the one it has helped to write, and not an earlier save of the same step.

DeepSpeed's own saver names a checkpoint as the latest one before all ranks have finished, and writes over the copy of an earlier save of
the same step; hence this layer.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError, fsync_path, read_json
from m2mkd_ds.checkpoint.saves.attempt import ALONE, Attempt, Deadline, Ranks
from m2mkd_ds.checkpoint.saves.folders import latest_checkpoint, recover, replaced_copy
from m2mkd_ds.checkpoint.saves.manifest import MANIFEST, FileRecord, check_size, verify_checkpoint, write_manifest
from m2mkd_ds.checkpoint.saves.retention import retire
from m2mkd_ds.checkpoint_config import CheckpointConfig

__all__ = ["Write", "begin", "commit_checkpoint", "complete", "failing_for_all", "latest_checkpoint", "verify_checkpoint"]

_log = logging.getLogger("m2mkd_ds")

Write = Callable[[Path], Mapping[str, FileRecord]]
"""Writes this rank's files into a folder, under names that no other rank uses -> their sizes and checksums by name."""

_TOKEN = ".no-rank-has-failed"
_FAILED = "failed.json"


def commit_checkpoint(
    root: str | Path,
    step: int,
    write: Write,
    record: Mapping[str, Any],
    *,
    ranks: Ranks = ALONE,
    config: CheckpointConfig | None = None,
) -> Path:
    """Save one checkpoint and wait for it; every rank calls it with its own `write`. Returns `root/step-<step>` on every rank.

    `record` is JSON data that comes back from `latest_checkpoint` (the main rank's counts). `root` must be seen by all ranks.
    Raises StoreError on every rank when any rank fails; then nothing has changed, older copies of the same step included.
    """
    settings = config or CheckpointConfig()
    attempt = begin(Path(root), step, ranks)
    complete(attempt, write, record, settings, Deadline(settings.deadline_s))
    return attempt.folder


def begin(root: Path, step: int, ranks: Ranks) -> Attempt:
    """Clear what crashes have left and make the temporary folder. Collective; no save of this root may be under way.

    Raises StoreError on every rank when the main rank cannot, and on a rank that does not see the main rank's folder.
    """
    if step < 0:
        raise ValueError(f"checkpoint step is {step}; allowed are steps >= 0")
    told = _prepare(root, step, ranks) if ranks.rank == 0 else ("", "")
    name, problem = ranks.broadcast(told)
    if problem:
        raise StoreError(problem)
    attempt = Attempt(root, step, name, ranks)
    if not attempt.temp.is_dir():
        raise StoreError(f"{attempt.temp}: rank {ranks.rank} does not see this folder, which rank 0 made; a run needs one shared folder")
    return attempt


def complete(attempt: Attempt, write: Write, record: Mapping[str, Any], config: CheckpointConfig, deadline: Deadline) -> None:
    """All that follows `begin`; no collective. Raises StoreError when any rank fails, or is not heard of before the deadline."""
    if attempt.ranks.rank == 0:
        with failing_for_all(attempt), _clear_errors(attempt.folder):
            write_part(attempt, write)
            deadline.restart()
            publish(attempt, record, deadline)
        _settle(attempt, config)
    else:
        _take_part(attempt, write, deadline)


def _take_part(attempt: Attempt, write: Write, deadline: Deadline) -> None:
    """The share of another rank than the main one."""
    failure: StoreError | None = None
    try:
        with failing_for_all(attempt), _clear_errors(attempt.folder):
            write_part(attempt, write)
    except StoreError as err:
        failure = err
    deadline.restart(times=2)  # rank 0 may begin to wait when this rank has waited already
    try:
        await_end(attempt, deadline)
    except StoreError as err:
        raise failure or err from None
    if failure is not None:
        # The main rank had read the part before its writer found fault with it. All that it lists was on the disk by then.
        _log.warning("%s: saved all the same: %s", attempt.folder, failure)


@contextmanager
def failing_for_all(attempt: Attempt) -> Iterator[None]:
    """Whatever is raised inside, before this rank's share of the save is done, ends the save on all ranks, with its text."""
    try:
        yield
    except BaseException as err:  # told to the others, and raised again
        if attempt.ranks.rank == 0:
            _leave_failure(attempt, str(err))
            raise
        try:
            _tell(attempt.part(attempt.ranks.rank), {"attempt": attempt.name, "failed": f"{type(err).__name__}: {err}"})
        except OSError:
            with suppress(OSError):  # else the deadline tells them
                (attempt.temp / _TOKEN).unlink()
        raise


def write_part(attempt: Attempt, write: Write) -> None:
    """Write this rank's files, force them to the disk, and then say so."""
    files = write(attempt.temp)
    paths = [attempt.temp / name for name in files]
    for path in [*paths, *{path.parent for path in paths}]:
        fsync_path(path)
    sums = {name: {"bytes": record[0], "sha256": record[1]} for name, record in files.items()}
    _tell(attempt.part(attempt.ranks.rank), {"attempt": attempt.name, "files": sums})


def publish(attempt: Attempt, record: Mapping[str, Any], deadline: Deadline) -> None:
    """On the main rank: collect the parts, write the manifest, rename."""
    parts = _collect(attempt, deadline)
    files = _merged(attempt, parts)
    for rank in parts:
        attempt.part(rank).unlink()
    (attempt.temp / _TOKEN).unlink()
    names = {str(rank): sorted(part["files"]) for rank, part in sorted(parts.items())}
    write_manifest(attempt.temp, attempt.step, record, attempt=attempt.name, files=files, parts=names)
    _swap_in(attempt)


def await_end(attempt: Attempt, deadline: Deadline) -> None:
    """On another rank than the main one: return when the attempt is committed; raise StoreError when it has failed or time is up."""
    problem = ""
    for time_is_up in deadline.looks():
        try:
            # Listed before anything is opened: on NFS that asks the server again, where a name may be remembered as absent.
            beside = set(os.listdir(attempt.root))
            if _is_committed(attempt):
                return
            inside = set(os.listdir(attempt.temp)) if attempt.temp.name in beside else set()
            if _FAILED in inside:
                raise _FailedElsewhereError(read_json(attempt.temp / _FAILED)["failed"])
            if attempt.temp.name not in beside and not _is_committed(attempt):
                raise _FailedElsewhereError(f"{attempt.folder}: not saved, rank 0 has given up (its own message says why)")
        except _FailedElsewhereError:
            raise
        except (OSError, StoreError) as err:  # a disk that fails once may answer the next time
            problem = f"; last error: {err}"
        if time_is_up:
            raise StoreError(f"{attempt.folder}: not known to be saved, no word from rank 0 within {deadline.granted_s:g} s{problem}")


class _FailedElsewhereError(StoreError):
    """A failure that another rank has written down: for good, however often one looks."""


def _prepare(root: Path, step: int, ranks: Ranks) -> tuple[str, str]:
    """(name of the attempt, what went wrong): make the temporary folder with its token."""
    attempt = Attempt(root, step, uuid.uuid4().hex, ranks)
    try:
        with _clear_errors(attempt.folder):
            root.mkdir(parents=True, exist_ok=True)
            recover(root)
            attempt.temp.mkdir()
            (attempt.temp / _TOKEN).touch()
    except StoreError as err:
        shutil.rmtree(attempt.temp, ignore_errors=True)
        return "", str(err)
    return attempt.name, ""


def _collect(attempt: Attempt, deadline: Deadline) -> dict[int, dict[str, Any]]:
    """Every rank's part; the token tells that none has failed without being able to write. Raises StoreError."""
    parts: dict[int, dict[str, Any]] = {}
    problem = ""
    for time_is_up in deadline.looks():
        try:
            names = set(os.listdir(attempt.temp))
            for rank in set(range(attempt.ranks.size)) - set(parts):
                if attempt.part(rank).name in names:
                    parts[rank] = read_json(attempt.part(rank))
        except (OSError, StoreError) as err:  # a disk that fails once may answer the next time
            problem = f"; last error: {err}"
            names = {_TOKEN}
        for rank, part in parts.items():
            if "failed" in part:
                raise StoreError(f"{attempt.folder}: not saved, rank {rank} could not write its part ({part['failed']})")
        if _TOKEN not in names:
            raise StoreError(f"{attempt.folder}: not saved, a rank could not write its part, nor why (its own message says it)")
        if len(parts) == attempt.ranks.size:
            return parts
        if time_is_up:
            silent = sorted(set(range(attempt.ranks.size)) - set(parts))
            raise StoreError(f"{attempt.folder}: not saved, no part came from ranks {silent} within {deadline.granted_s:g} s{problem}")
    raise AssertionError("looks() never ends")


def _merged(attempt: Attempt, parts: Mapping[int, Mapping[str, Any]]) -> dict[str, FileRecord]:
    """The files of all parts, each there with its size. Their contents were summed up by who wrote them and are not read again."""
    files: dict[str, FileRecord] = {}
    for rank, part in parts.items():
        if part["attempt"] != attempt.name or files.keys() & part["files"].keys():
            raise StoreError(f"{attempt.part(rank)}: not of this save, or with names that another rank uses, too")
        for name, sums in part["files"].items():
            files[name] = FileRecord(sums["bytes"], sums["sha256"])
            check_size(attempt.temp / name, files[name].bytes)
    return files


def _swap_in(attempt: Attempt) -> None:
    """The commit. An earlier copy of the step steps aside under a name that `latest_checkpoint` knows, and back on failure."""
    aside = replaced_copy(attempt.folder)
    if attempt.folder.exists():
        os.rename(attempt.folder, aside)
    try:
        os.rename(attempt.temp, attempt.folder)
    except OSError:
        if not _is_committed(attempt):  # some file systems report a failure of a rename that they have made
            raise
    finally:
        if aside.exists() and not attempt.folder.exists():
            os.rename(aside, attempt.folder)


def _settle(attempt: Attempt, config: CheckpointConfig) -> None:
    """After the commit, on the main rank: force the new name to the disk, then retire. Nothing here can undo what the others see."""
    try:
        fsync_path(attempt.root)
    except OSError as err:
        # What is older may be needed after a power cut.
        _log.warning("%s: saved, but the disk did not confirm it (%s); older checkpoints stay for now", attempt.folder, err.strerror)
        return
    retire(attempt.folder, config)


def _leave_failure(attempt: Attempt, reason: str) -> None:
    """Leave the reason for the other ranks, and give back space; the next `begin` removes the rest. Without others, leave nothing."""
    if attempt.ranks.size > 1:
        try:
            _tell(attempt.temp / _FAILED, {"failed": reason})
            _remove_finished_parts(attempt)
            return
        except OSError as err:
            _log.warning("%s: the other ranks cannot be told why it failed (%s)", attempt.temp, err)
    # That it is gone tells them as well. Renamed first: while others write there, a folder cannot be emptied for good.
    doomed = attempt.temp.with_name(attempt.temp.name + ".tmp")
    with suppress(OSError):
        os.rename(attempt.temp, doomed)
    for folder in (doomed, attempt.temp):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_finished_parts(attempt: Attempt) -> None:
    """Files of ranks that have written all of theirs; nobody's file is taken away under its writer."""
    with suppress(OSError, StoreError):  # only space is at stake
        for part in attempt.temp.glob("part-*.json"):
            for name in read_json(part).get("files", ()):
                (attempt.temp / name).unlink()


def _tell(path: Path, words: Mapping[str, Any]) -> None:
    """A file for the other ranks, seen whole or not at all. Not forced to the disk: after a crash nobody reads it. Raises OSError."""
    temp = path.with_name(f".{path.name}.tmp")
    temp.write_text(json.dumps(words), encoding="utf-8")
    os.replace(temp, path)


def _is_committed(attempt: Attempt) -> bool:
    manifest = attempt.folder / MANIFEST
    return manifest.is_file() and read_json(manifest).get("attempt") == attempt.name


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """Turn what writers raise on a full or broken disk (torch.save: a RuntimeError without a reason) into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as err:
        place = next(parent for parent in folder.parents if parent.exists())
        free = shutil.disk_usage(place).free / 2**20
        raise StoreError(
            f"{folder}: checkpoint not saved ({err}); {free:.1f} MiB are free on that disk; earlier checkpoints are untouched: "
            "free space or choose another run folder, then run the same command again"
        ) from err

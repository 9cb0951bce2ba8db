"""The commit protocol for checkpoint folders: what all ranks have written becomes visible at once, or not at all.

    root/step-00000100.tmp       1. the main rank makes it      2. every rank writes its part and forces it to disk
                                 3. all agree that every part is there
    root/step-00000100.tmp/manifest.json   4. main writes sizes, SHA-256 and the record, last
    root/step-00000100           5. main renames: this is the commit; then old steps are retired

DeepSpeed's own saver names a checkpoint as the latest one before all ranks have finished, and writes over the copy of an
earlier save of the same step; hence this layer. Ranks agree through the folder, not through messages: a rank that fails
takes the token file away (removing works on a full disk, too), so no rank is left waiting for one that has given up.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError, fsync_path, read_json
from m2mkd_ds.checkpoint.manifest import MANIFEST, check_size, hash_files, read_manifest, verify_checkpoint, write_manifest

_log = logging.getLogger("m2mkd_ds")

_TOKEN = ".every-part-is-here"
_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"step-\d+.*\.tmp")


def commit_checkpoint(
    root: str | Path,
    step: int,
    write: Callable[[Path], None],
    record: Mapping[str, Any],
    *,
    is_main: bool,
    barrier: Callable[[], None],
    keep: int = 2,
) -> Path:
    """Save one checkpoint; a collective call, every rank with its own `write`. Returns `root/step-<step>` on every rank.

    `write(folder)` writes this rank's files under names that no other rank uses; `record` is JSON data that comes back from
    `latest_checkpoint` (the main rank's counts). `root` must be seen by all ranks. The newest `keep` good checkpoints stay.
    Raises StoreError on every rank when any rank fails; then nothing has changed, older copies of the same step included.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"checkpoint step is {step} and keep is {keep}; allowed are step >= 0 and keep >= 1")
    folder = Path(root) / f"step-{step:08d}"
    temp = folder.with_name(folder.name + ".tmp")
    with _clear_errors(folder):
        attempt = _write_together(temp, write, is_main, barrier)
        try:
            if is_main:
                _publish(temp, folder, step, record, attempt)
        finally:
            barrier()
            if is_main:
                shutil.rmtree(temp, ignore_errors=True)
        # The manifest itself tells the other ranks whether it is this attempt's, and not the one of an earlier save of this step.
        if _attempt_of(folder) != attempt:
            raise StoreError(f"{folder}: not saved, the main rank could not publish it (its own message says why)")
    if is_main:
        _retire(folder, keep)
    return folder


def latest_checkpoint(root: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose manifest and files verify, with its record; None when nothing was ever committed.

    Reads every byte of it once, so let one rank call this and tell the others. A broken checkpoint is named in a warning and
    the one before is used; when there are only broken ones, raises StoreError rather than let a run start again from zero.
    """
    problems = []
    for _, folder in reversed(_committed(Path(root))):
        try:
            return folder, verify_checkpoint(folder)
        except StoreError as err:
            _log.warning("checkpoint skipped: %s", err)
            problems.append(str(err))
    if problems:
        raise StoreError(f"{root}: no checkpoint is usable ({'; '.join(problems)}); delete the folder to start again from step 0")
    return None


def _write_together(temp: Path, write: Callable[[Path], None], is_main: bool, barrier: Callable[[], None]) -> str:
    """Steps 1 to 3. Returns the name of this attempt, the same on every rank. Every way out passes the same barriers."""
    try:
        if is_main:
            _prepare(temp)
    finally:
        barrier()
    if not temp.is_dir():
        raise StoreError(f"{temp}: the main rank could not make this folder (its own message says why), or this rank does not see it")
    token = temp / _TOKEN
    done = False
    try:
        write(temp)
        _fsync_tree(temp)
        done = True
    finally:
        if not done:
            token.unlink(missing_ok=True)
        barrier()
        # Opening, not stat: on NFS an open asks the server again, a stat may be answered from this host's cache.
        attempt = _read_or_none(token)
        # Nobody may remove or rename the folder before all have looked.
        barrier()
        if is_main and attempt is None:
            shutil.rmtree(temp, ignore_errors=True)
    if attempt is None:
        raise StoreError(f"{temp}: not saved, another rank could not write its part (its own message says why)")
    return attempt


def _prepare(temp: Path) -> None:
    """Clear what a crash has left, then make the folder with its token."""
    root = temp.parent
    root.mkdir(parents=True, exist_ok=True)
    _recover(root)
    ready = False
    try:
        temp.mkdir()
        (temp / _TOKEN).write_text(uuid.uuid4().hex)
        ready = True
    finally:
        if not ready:
            shutil.rmtree(temp, ignore_errors=True)


def _publish(temp: Path, folder: Path, step: int, record: Mapping[str, Any], attempt: str) -> None:
    """Steps 4 and 5. An earlier copy of the step steps aside under a name that `latest_checkpoint` knows, and back on failure."""
    (temp / _TOKEN).unlink()
    write_manifest(temp, step, record, attempt=attempt, files=hash_files(temp))
    aside = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(temp, folder)
    finally:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
    fsync_path(folder.parent)


def _retire(newest: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest good checkpoints, and the copy that the new one has replaced.

    A failure here harms nothing that is needed, so it is a warning. Renamed first: a half-deleted folder never looks like a checkpoint.
    """
    root = newest.parent
    # Sizes only, since hashing everything at each save would be slow; the checkpoint just written counts as good in any case.
    good = [folder for _, folder in _committed(root) if folder == newest or _looks_whole(folder)]
    kept = set(good[-keep:]) | {newest}
    oldest = min(_step_of(folder) for folder in kept)
    for step, folder in _committed(root):
        is_replaced = folder.name.endswith(".replaced")
        if (is_replaced and step == _step_of(newest)) or (step < oldest and folder not in kept):
            try:
                doomed = folder.with_name(folder.name + ".deleted.tmp")
                os.rename(folder, doomed)
                shutil.rmtree(doomed)
            except OSError as err:
                _log.warning("%s: an old checkpoint could not be deleted (%s)", folder, err.strerror)


def _recover(root: Path) -> None:
    """Remove half-written folders, and bring back a copy whose replacement never came."""
    for path in sorted(root.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            _log.warning("%s: left by a save that did not finish, removed", path)
            shutil.rmtree(path)
    for _, path in _committed(root):
        if path.name.endswith(".replaced"):
            folder = path.with_name(path.name.removesuffix(".replaced"))
            if folder.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, folder)


def _committed(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, oldest step first (by number, not by name); a step's replaced copy comes before the step itself."""
    if not root.is_dir():
        return []
    found = [(_FOLDER.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    entries = [(int(match[1]), match[2] is None, path) for match, path in found if match]
    return [(step, path) for step, _, path in sorted(entries)]


def _step_of(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _looks_whole(folder: Path) -> bool:
    try:
        for name, expected in read_manifest(folder)["files"].items():
            check_size(folder / name, expected["bytes"])
    except StoreError:
        return False
    return True


def _attempt_of(folder: Path) -> str | None:
    return str(read_json(folder / MANIFEST).get("attempt")) if (folder / MANIFEST).is_file() else None


def _read_or_none(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _fsync_tree(folder: Path) -> None:
    """Force everything below `folder` to disk. Other ranks are writing there, too: what vanishes was a temporary name of theirs."""
    for path in [*folder.rglob("*"), folder]:
        try:
            fsync_path(path)
        except FileNotFoundError:
            continue


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

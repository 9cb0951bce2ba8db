"""Checkpoint folders below `checkpoints/`: what their names say, which one is the newest that is good, and what a crash leaves.

    step-00000100                committed: every file of every rank is there, and was forced to the disk
    step-00000100.replaced       an earlier save of the same step, until the new one has taken its place
    step-00000100.<id>.tmp       a save under way, or one that did not come to its end
    step-00000100.deleted.tmp    an old one on its way out
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.saves.manifest import check_size, read_manifest, verify_checkpoint

_log = logging.getLogger("m2mkd_ds")

_REPLACED = ".replaced"
_FOLDER = re.compile(r"step-(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"step-\d+.*\.tmp")


def latest_checkpoint(root: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose manifest and files verify, with its record; None when nothing was ever committed.

    Reads every byte of it once, so let one rank call this and tell the others. A broken checkpoint is named in a warning and
    the one before is used; when there are only broken ones, raises StoreError rather than let a run start again from zero.
    """
    problems = []
    for _, folder in reversed(committed(Path(root))):
        try:
            return folder, verify_checkpoint(folder)
        except StoreError as err:
            _log.warning("checkpoint skipped: %s", err)
            problems.append(str(err))
    if problems:
        raise StoreError(f"{root}: no checkpoint is usable ({'; '.join(problems)}); delete the folder to start again from step 0")
    return None


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return root / f"step-{step:08d}"


def committed(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, oldest step first (by number, not by name); a step's replaced copy comes before the step itself."""
    if not root.is_dir():
        return []
    found = [(_FOLDER.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    entries = [(int(match[1]), match[2] is None, path) for match, path in found if match]
    return [(step, path) for step, _, path in sorted(entries)]


def is_replaced(folder: Path) -> bool:
    """Whether the folder is the earlier copy of a step that was saved again."""
    return folder.name.endswith(_REPLACED)


def replaced_copy(folder: Path) -> Path:
    """Where an earlier copy of `folder` steps aside to."""
    return folder.with_name(folder.name + _REPLACED)


def looks_whole(folder: Path) -> bool:
    """Whether the manifest is good and all files have their sizes; contents are not read."""
    try:
        for name, expected in read_manifest(folder)["files"].items():
            check_size(folder / name, expected["bytes"])
    except StoreError:
        return False
    return True


def delete(folder: Path) -> None:
    """Delete a checkpoint. Renamed first: a half-deleted folder never looks like one."""
    doomed = folder.with_name(folder.name + ".deleted.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def recover(root: Path) -> None:
    """Remove half-written folders, and bring back a copy whose replacement never came. Not while a save is under way."""
    for path in sorted(root.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            _log.warning("%s: left by a save that did not finish, removed", path)
            shutil.rmtree(path)
    for _, path in committed(root):
        if is_replaced(path):
            folder = path.with_name(path.name.removesuffix(_REPLACED))
            if folder.exists():
                delete(path)
            else:
                os.rename(path, folder)

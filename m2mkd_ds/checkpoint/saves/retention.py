"""Which checkpoints stay: the newest ones, every n-th, the best by score. Old ones go after a commit, never before it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.saves.folders import committed, delete, is_replaced, looks_whole
from m2mkd_ds.checkpoint.saves.manifest import read_manifest
from m2mkd_ds.checkpoint_config import CheckpointConfig

_log = logging.getLogger("m2mkd_ds")


def retire(newest: Path, config: CheckpointConfig) -> None:
    """Delete what `config` does not keep, and the copy that `newest`, just committed, has replaced.

    What is broken counts for nothing, and goes when all that is kept by age is newer. A failure here harms nothing that is needed, so
    it is a warning.
    """
    try:
        doomed = to_delete(newest, config)
    except OSError as err:
        _log.warning("%s: old checkpoints could not be looked at (%s)", newest.parent, err.strerror)
        return
    for folder in doomed:
        try:
            delete(folder)
        except OSError as err:
            _log.warning("%s: an old checkpoint could not be deleted (%s)", folder, err.strerror)


def to_delete(newest: Path, config: CheckpointConfig) -> list[Path]:
    """The folders beside `newest` that may go, oldest first."""
    found = committed(newest.parent)
    step_of = {folder: step for step, folder in found}
    replaced = {folder for step, folder in found if is_replaced(folder) and step == step_of[newest]}
    last = _last(newest, [folder for _, folder in found if folder not in replaced], config.keep_last)
    oldest = min(step_of[folder] for folder in last)
    kept = last | {folder for step, folder in found if config.keep_every and step % config.keep_every == 0 and not is_replaced(folder)}
    kept |= _best([folder for folder in step_of if not is_replaced(folder)], config.keep_best)
    return [folder for step, folder in found if folder in replaced or (step < oldest and folder not in kept)]


def prune(root: Path, after_done: str) -> None:
    """What a finished phase leaves: `keep` all, the `last` one, or `none`. Raises OSError for what cannot be deleted."""
    folders = [folder for _, folder in committed(root)] if after_done != "keep" else []
    if after_done == "last":
        good = [folder for folder in folders if looks_whole(folder)]
        folders = [folder for folder in folders if folder not in good[-1:]] if good else []
    for folder in folders:
        delete(folder)


def score_of(folder: Path) -> float | None:
    """The score in the record of a checkpoint; None for one that has none or cannot be read. Larger is better."""
    try:
        record: dict[str, Any] = read_manifest(folder)["record"]
    except StoreError:
        return None
    score = record.get("score")
    return float(score) if isinstance(score, (int, float)) and math.isfinite(score) else None


def _last(newest: Path, folders: list[Path], count: int) -> set[Path]:
    """The newest `count` good ones, `newest` among them in any case."""
    last: list[Path] = []
    for folder in reversed(folders):
        # Sizes only, since hashing everything at each save would be slow; and of as few as possible, since kept ones may be many.
        if len(last) < count and (folder == newest or looks_whole(folder)):
            last.append(folder)
    return {*last, newest}


def _best(folders: list[Path], count: int) -> set[Path]:
    """The `count` good ones with the highest scores; of equal ones the newer."""
    if count == 0:
        return set()
    scored = [(score, folder) for folder in folders if (score := score_of(folder)) is not None and looks_whole(folder)]
    return {folder for _, folder in sorted(scored, key=lambda pair: pair[0])[-count:]}

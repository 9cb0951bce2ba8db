"""Which checkpoint a path means: a checkpoint folder itself, or the newest good one of a phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.saves.commit import latest_checkpoint
from m2mkd_ds.checkpoint.saves.manifest import MANIFEST, verify_checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like one checkpoint, good or damaged."""
    return path.is_dir() and ((path / MANIFEST).is_file() or next(path.glob("engine_rank_*"), None) is not None)


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `path` means (`step-...`, a folder of them, or a phase's folder) and its record. Reads every byte of it once.

    Raises StoreError when it is damaged, when there is none, and when a phase has several trained modules.
    """
    if is_checkpoint(path):
        try:
            return path, verify_checkpoint(path)
        except StoreError as err:
            raise StoreError(f"{err}; take an earlier checkpoint, or name the phase's folder for its newest good one") from err
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = latest_checkpoint(root)
    if found is not None:
        return found
    inside = sorted(p.relative_to(path).as_posix() for p in path.glob("**/checkpoints") if p.is_dir()) if path.is_dir() else []
    hint = f"; name one of {', '.join(inside[:8])}" if inside else ""
    raise StoreError(f"{path}: no checkpoint here (a folder step-00000100, a folder of them, or the folder of a phase){hint}")

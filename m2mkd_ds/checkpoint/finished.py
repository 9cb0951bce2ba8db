"""done.json, by which a node of a run says that it is finished, read back: and whether a file still has the bytes that it records.

A safetensors header vouches for a file's length only. The record is written by train/nodes.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, read_json

DONE = "done.json"


def read_done(folder: Path) -> dict[str, Any] | None:
    """The record of a finished node (or pair), else None. Raises StoreError for a damaged one."""
    file = folder / DONE
    return read_json(file, if_damaged="delete it, and the node runs again") if file.is_file() else None


def check_finished(file: Path) -> bool:
    """True where the record beside `file` lists it with these bytes, False where nothing vouches for it. Reads all of it.

    Raises StoreError for other bytes, and for a damaged record.
    """
    entry = (read_done(file.parent) or {}).get("files", {}).get(file.name)
    if entry is None:
        return False
    if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
        raise StoreError(
            f"{file}: damaged, it has not the bytes that {file.parent / DONE} records; restore it from a copy, or delete that record, and "
            "the node runs again"
        )
    return True

"""Whether a file still has the bytes that its node recorded in done.json, its last act. A header vouches for a file's length only."""

from __future__ import annotations

from pathlib import Path

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, read_json

DONE = "done.json"


def check_finished(file: Path) -> bool:
    """True where the done.json beside `file` lists it with these bytes, False where nothing vouches for it. Reads all of it.

    Raises StoreError for other bytes, and for a damaged record.
    """
    record = file.parent / DONE
    if not record.is_file():
        return False
    files = read_json(record, if_damaged="delete it, and the node runs again").get("files", {})
    entry = files.get(file.name)
    if entry is None:
        return False
    if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
        raise StoreError(
            f"{file}: damaged, it has not the bytes that {record} records; restore it from a copy, or delete that record, and the node "
            "runs again"
        )
    return True

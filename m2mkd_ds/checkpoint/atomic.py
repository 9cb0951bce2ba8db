"""Files that are either whole or not there: temporary name, forced to disk, renamed over the old file. And JSON, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 22


class StoreError(ValueError):
    """A file or folder that cannot be written, or is missing, damaged or not what was asked for; the message names it."""


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises StoreError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as err:
        raise StoreError(f"{path}: cannot be read ({err.strerror})") from err
    return digest.hexdigest()


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON. Raises StoreError for what JSON cannot hold (NaN too) and for a full disk."""
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise StoreError(f"{path}: not written, because JSON cannot hold it ({err})") from err
    with replacing(Path(path)) as temp:
        temp.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path, *, if_damaged: str = "") -> Any:
    """Read a JSON file. Raises StoreError when it is missing or damaged; only the caller knows what is to be done then: `if_damaged`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as err:
        raise StoreError(f"{path}: cannot be read ({err.strerror})") from err
    except ValueError as err:
        raise StoreError(f"{path}: damaged, not JSON ({err}){if_damaged and f'; {if_damaged}'}") from err


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_new_file(out: Path, suffix: str) -> None:
    """Raises StoreError unless `out` ends in `suffix`, its folder is there, and nothing has its name: known before the work for it."""
    if out.suffix != suffix:
        raise StoreError(f"{out}: the file to write must end in {suffix}")
    if not out.parent.is_dir():
        raise StoreError(f"{out}: there is no folder {out.parent}; make it, or name a file elsewhere")
    if out.exists():
        raise StoreError(f"{out}: exists already; nothing is written over: name another file")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give an empty temporary file beside `out`; on success it is forced to disk and renamed to `out`, else removed."""
    temp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temp.touch()
        yield temp
        fsync_path(temp)
        os.replace(temp, out)
        fsync_path(out.parent)
    except OSError as err:
        raise StoreError(f"{out}: not written ({err.strerror or err}); free space or choose another folder, then run it again") from err
    finally:
        with suppress(OSError):  # a disk that refuses this, too, has had its error told
            temp.unlink(missing_ok=True)

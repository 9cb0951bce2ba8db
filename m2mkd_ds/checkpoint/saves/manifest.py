"""The manifest of a checkpoint folder: which files belong to it, with sizes and SHA-256, and the record of what it is.

    manifest.json = {format, step, attempt, files: {name: {bytes, sha256}}, parts: {rank: names}, record, sha256 (of all the rest)}

It is written last: a folder without one was never finished (`commit.py`). Whoever has written a file and hashed it meanwhile brings its
`FileRecord` along, so that no file is read again only to be hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, read_json, write_json_atomic

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the manifest, not of the files that it lists."""


class FileRecord(NamedTuple):
    """What a manifest says of one file."""

    bytes: int
    sha256: str
    """In hex."""


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Every file below `folder`, by its path in it. Reads all of them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, file_sha256(path)) for path in found}


def write_manifest(
    folder: Path,
    step: int,
    record: Mapping[str, Any],
    *,
    attempt: str,
    files: Mapping[str, FileRecord],
    parts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write `folder`/manifest.json, whole or not at all; `attempt` names the save that made the folder, `parts` says which rank wrote what.

    Raises StoreError for a record that is not plain JSON data, and for a full disk.
    """
    listed = {name: {"bytes": files[name].bytes, "sha256": files[name].sha256} for name in sorted(files)}
    body = _as_json(
        {"format": FORMAT, "step": step, "attempt": attempt, "files": listed, "parts": dict(parts or {}), "record": dict(record)}
    )
    write_json_atomic(folder / MANIFEST, {**body, "sha256": _body_sha256(body)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, without its own checksum. Raises StoreError when it is missing, damaged or of another version."""
    if not (folder / MANIFEST).is_file():
        raise StoreError(f"{folder}: no {MANIFEST}, so it was never finished, or not written by this program")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{folder / MANIFEST}: damaged, or of another version (this program reads format {FORMAT})")
    digest = manifest.pop("sha256", None)
    if digest != _body_sha256(manifest):
        raise StoreError(f"{folder / MANIFEST}: damaged, its content does not match its own SHA-256")
    return manifest


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are all there with the right bytes. Raises StoreError naming the first that is not."""
    path = Path(folder)
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        check_file(path / name, FileRecord(expected["bytes"], expected["sha256"]))
    record: dict[str, Any] = manifest["record"]
    return record


def check_file(path: Path, expected: FileRecord) -> None:
    """Raises StoreError when the file is missing or has other bytes; reads all of it."""
    check_size(path, expected.bytes)
    if file_sha256(path) != expected.sha256:
        raise StoreError(f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}")


def check_size(path: Path, expected: int) -> None:
    """Raises StoreError when the file is missing or has not `expected` bytes."""
    if not path.is_file():
        raise StoreError(f"{path}: missing, though {MANIFEST} lists it")
    if path.stat().st_size != expected:
        raise StoreError(f"{path}: damaged, it has {path.stat().st_size} bytes and {MANIFEST} says {expected}")


def _as_json(body: Mapping[str, Any]) -> Any:
    """What reading it back will give (text keys, lists for tuples), so that the checksum written is the checksum found."""
    try:
        return json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as err:
        raise StoreError(f"the checkpoint's record is not plain JSON data ({err})") from err


def _body_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

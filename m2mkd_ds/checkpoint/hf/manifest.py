"""How an exported folder is told from others, and a whole one from a changed one: model type, and a manifest of checksums.

Imports no torch, so that a folder is pushed without waiting for it.
"""

from __future__ import annotations

from pathlib import Path

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, read_json, write_json_atomic

MODEL_TYPE = "m2mkd_vmoe"
"""`model_type` of config.json."""
MANIFEST = "manifest.json"
"""{"format": 1, "files": {name: {"bytes", "sha256"}}}, all files but itself."""


def write_manifest(folder: Path) -> None:
    """manifest.json: size and SHA-256 of every file that lies in the folder now."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(folder.iterdir())}
    write_json_atomic(folder / MANIFEST, {"format": 1, "files": files})


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, SHA-256). Raises StoreError for a manifest that cannot be read or was not written by `write_manifest`."""
    tree = read_json(folder / MANIFEST, if_damaged="export it again")
    try:
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in tree["files"].items()}
    except (KeyError, TypeError, AttributeError) as err:
        raise StoreError(f"{folder / MANIFEST}: not the manifest of an exported folder; export it again") from err


def verify_manifest(folder: Path) -> None:
    """Compare every file with the manifest, if there is one (transformers' save_pretrained writes none). Raises StoreError."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    for name, (_, sha256) in read_manifest(folder).items():
        if file_sha256(folder / name) != sha256:
            raise StoreError(f"{folder / name}: changed since the export (its SHA-256 is not the manifest's); export it again")

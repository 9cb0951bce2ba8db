"""Weights as safetensors files: written whole or not at all, equal content in equal bytes, read by slices.

The rest of the store is one import away from here: `atomic.py` (JSON, checksums, the rename), `commit.py` (folders that several ranks
fill) and `manifest.py` (what such a folder holds).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, read_json, replacing, write_json_atomic
from m2mkd_ds.checkpoint.finished import check_finished
from m2mkd_ds.checkpoint.saves.commit import commit_checkpoint, latest_checkpoint
from m2mkd_ds.checkpoint.saves.manifest import verify_checkpoint
from m2mkd_ds.checkpoint.state.safetensors_stream import METADATA_KEY

__all__ = [
    "StoreError",
    "commit_checkpoint",
    "file_sha256",
    "latest_checkpoint",
    "read_json",
    "read_metadata",
    "read_weights",
    "save_weights",
    "verify_checkpoint",
    "weight_shapes",
    "write_json_atomic",
]


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write `tensors` (any device, any strides) to a safetensors file; equal content gives equal bytes.

    Views and shared tensors are stored by value. Returns the file's SHA-256. Raises StoreError, and leaves the old file as it
    was, when the disk is full or the folder cannot be written.
    """
    out = Path(path)
    packed = _packed(tensors)
    # An empty dict of metadata is written too: a file without any would not be told apart from a foreign one.
    text = json.dumps(dict(metadata or {}), sort_keys=True)
    with replacing(out) as temp:
        # save_file makes its files private to the user; the rights of a plainly created file are restored.
        mode = temp.stat().st_mode
        try:
            save_file(packed, temp, metadata={METADATA_KEY: text})
        except SafetensorError as err:
            raise OSError(str(err)) from err
        temp.chmod(mode)
        digest = file_sha256(temp)
    return digest


def read_weights(path: str | Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Read all tensors, or only those in `names` (nothing else is read from the disk), onto the CPU.

    A whole file is compared with the done.json beside it first, where there is one. Raises StoreError for a missing or damaged file, or a
    name that it does not hold.
    """
    with _opened(path) as file:
        if names is None:
            check_finished(Path(path))
        held = sorted(file.keys())
        wanted = held if names is None else list(names)
        missing = sorted(set(wanted) - set(held))
        if missing:
            near = difflib.get_close_matches(missing[0], held, n=1)
            also = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            hint = f"; the nearest of its {len(held)} names is {near[0]}" if near else f"; it holds {len(held)} names"
            raise StoreError(f"{path}: no tensor {missing[0]}{also}{hint}")
        return {name: file.get_tensor(name) for name in wanted}


def weight_shapes(path: str | Path) -> dict[str, torch.Size]:
    """Shapes by name; reads the header only."""
    with _opened(path) as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def read_metadata(path: str | Path) -> dict[str, str]:
    """What `save_weights` got as metadata; for a file of another program, its own metadata."""
    with _opened(path) as file:
        raw: dict[str, str] = file.metadata() or {}
    return json.loads(raw[METADATA_KEY]) if METADATA_KEY in raw else raw


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """An open safetensors file; every way in which it can be unreadable becomes a StoreError."""
    if not Path(path).is_file():
        raise StoreError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as err:
        raise StoreError(f"{path}: damaged or not a safetensors file ({err}); delete it and make it again") from err


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, sorted by name, each in a storage of its own: safetensors refuses views and shared storages."""
    packed, seen = {}, set()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.numel() * value.element_size() or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        packed[name] = value
    return packed

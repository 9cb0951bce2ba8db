"""Safetensors files written and read piece by piece, so that neither side ever holds a file, nor even a large tensor, in memory.

Writing: the header first, then the bytes of tensor after tensor, hashed while they go by and forced to disk at the end. Equal content
gives equal bytes, the same as `save_weights` makes. Reading: any run of elements by plain reads, not by a memory map, whose touched
pages count as the process's memory, and which ends the process when a file on a network disk turns out shorter than promised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.saves.manifest import FileRecord

METADATA_KEY = "m2mkd_ds"
"""All metadata are one JSON text under this key: safetensors writes several keys in random order, so that equal content would
have unequal checksums."""
PIECE_NUMEL = 1 << 20
"""Largest run of elements in memory at a time: 4 MiB of fp32. The C library keeps freed pieces for later, so a process grows by several."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.shape.numel() * self.dtype.itemsize


def info_of(tensor: Tensor) -> TensorInfo:
    """What the header will say of `tensor`."""
    return TensorInfo(tensor.dtype, tensor.shape)


def file_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """The order in which a file holds tensors: wide elements first, so that each lies on a multiple of its own size; then by name."""
    return sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, -_rank_of(infos[name].dtype), name))


def write_stream(path: Path, infos: Mapping[str, TensorInfo], pieces: Iterable[Tensor], metadata: str) -> FileRecord:
    """Write a new file `path`: `pieces` are runs of elements that follow one another through the tensors in the order of `file_order`.

    `metadata` is one text. Raises StoreError for pieces that do not fit the header, and OSError for a full disk; what is on the disk then
    is for the caller to remove.
    """
    digest = hashlib.sha256()
    order = file_order(infos)
    with path.open("xb") as file:
        total = _put(file, _header(infos, order, metadata), digest)
        queue = iter(pieces)
        for name in order:
            left = infos[name].shape.numel()
            while left:
                piece = next(queue, None)
                if piece is None or piece.dtype != infos[name].dtype or piece.numel() > left:
                    raise StoreError(f"{path}: {name} was to get {left} more elements of {infos[name].dtype}, and other ones came")
                total += _put(file, _bytes(piece), digest)
                left -= piece.numel()
        if next(queue, None) is not None:
            raise StoreError(f"{path}: more elements came than the header promises")
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(total, digest.hexdigest())


class TensorFile:
    """A safetensors file, of which only the header is in memory. Open no longer than a read lasts."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError for a file that is missing, cut short, or not safetensors; nothing in it is ever run."""
        self.path = path
        if not path.is_file():
            raise StoreError(f"{path}: this file of the checkpoint is missing; take an earlier checkpoint")
        try:
            # The reference implementation checks the header against the file's length; then its numbers can be trusted.
            with safe_open(path, framework="pt", device="cpu"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (OSError, SafetensorError) as err:
            raise StoreError(f"{path}: damaged or not a safetensors file ({err})") from err
        self._data_start = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        foreign = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
        if foreign:
            raise StoreError(f"{path}: holds tensors of {', '.join(foreign)}, which this program does not know")
        self.tensors = {name: TensorInfo(_DTYPES[entry["dtype"]], torch.Size(entry["shape"])) for name, entry in header.items()}
        self._begins = {name: int(entry["data_offsets"][0]) for name, entry in header.items()}

    def read_run(self, name: str, start: int, length: int) -> Tensor:
        """The elements [start, start + length) of the flattened tensor."""
        info = self.tensors[name]
        if not 0 <= start <= start + length <= info.shape.numel():
            raise StoreError(f"{self.path}: {name} has {info.shape.numel()} elements, and [{start}, {start + length}) was asked for")
        run = torch.empty(length, dtype=info.dtype)
        if length:
            self._read_into(run, self._data_start + self._begins[name] + start * info.dtype.itemsize)
        return run

    def runs(self, name: str, start: int, length: int) -> Iterator[Tensor]:
        """The same in pieces of at most PIECE_NUMEL elements."""
        for at in range(start, start + length, PIECE_NUMEL):
            yield self.read_run(name, at, min(PIECE_NUMEL, start + length - at))

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        info = self.tensors[name]
        return self.read_run(name, 0, info.shape.numel()).view(info.shape)

    def _read_into(self, run: Tensor, offset: int) -> None:
        view = _bytes(run)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise StoreError(f"{self.path}: damaged, it ends before its last tensor does")
                    done += count
        except OSError as err:
            raise StoreError(f"{self.path}: cannot be read ({err.strerror or err})") from err


def _bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor on the CPU as they lie in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header(infos: Mapping[str, TensorInfo], order: list[str], metadata: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {METADATA_KEY: metadata}}
    at = 0
    for name in order:
        info = infos[name]
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the first tensor lies on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _put(file: IO[bytes], data: bytes | memoryview, digest: hashlib._Hash) -> int:
    file.write(data)
    digest.update(data)
    return len(data)


def _rank_of(dtype: torch.dtype) -> int:
    """Among types of one width, the format's own order (floats behind integers, booleans first)."""
    order = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
    return order.index(_NAMES[dtype])

"""The folder of stored teacher logits: what lies in it, and how it is read and checked. export.py writes it, replay.py trains from it.

    contents.json                      first: of which models, images and order these are the logits
    parts/START-STOP.pairI.npy         logits [STOP - START, V] of stream positions START..STOP-1; bf16 lies as its bits, uint16
    parts/START-STOP.json              after the files of a part: their sizes and checksums
    manifest.json                      last: contents and all parts; a folder without it is not finished

Names follow from numbers, so no file can name another one outside of the folder. Nothing here is ever unpickled.
Shape letters: B images, V classes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from m2mkd_ds.data.atomic import AtomicFile, file_sha256
from m2mkd_ds.data.plan import BatchLayout

FORMAT_VERSION = 1
CONTENTS, MANIFEST, PARTS = "contents.json", "manifest.json", "parts"

StoredDtype = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "fp16": (torch.float16, "<f2"), "bf16": (torch.bfloat16, "<u2"), "fp32": (torch.float32, "<f4"),
}  # fmt: skip
"""torch's dtype and numpy's on disk, by name."""

Number = Annotated[int, Field(ge=0, lt=2**62)]


class StoreError(ValueError):
    """A folder of logits that is missing, unfinished, damaged or of something else; the message names the file or field."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Whose logits these are."""

    version: int
    fingerprints: dict[str, str]
    """As `handshake.fingerprints`."""
    layout: BatchLayout
    """The micro-batches that they were made in."""
    pairs: tuple[Number, ...]
    dtype: StoredDtype
    classes: Number
    start: Number
    """First stream position."""

    def row_bytes(self) -> int:
        """Of one image and one pair."""
        return self.classes * DTYPES[self.dtype][0].itemsize


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One pair's file of a part."""

    pair: Number
    bytes: Number
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A damaged image, and the sample that took its place (`BadSample`)."""

    position: Number
    substitute: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """Stream positions start..stop-1, all pairs."""

    start: Number
    stop: Number
    files: tuple[PartFile, ...]
    replaced: tuple[Replaced, ...] = ()

    @property
    def name(self) -> str:
        """Of its files, without endings."""
        return part_name(range(self.start, self.stop))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished folder."""

    contents: Contents
    parts: tuple[Part, ...]

    @property
    def positions(self) -> range:
        """Stored stream positions."""
        return range(self.contents.start, self.parts[-1].stop if self.parts else self.contents.start)


for _cls in (Contents, PartFile, Replaced, Part, Manifest):
    _cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]

_Record = TypeVar("_Record", Contents, Part, Manifest)


def part_name(positions: range) -> str:
    """`000000000000-000000065536`: sorts by position."""
    return f"{positions.start:012d}-{positions.stop:012d}"


def pair_file(folder: Path, name: str, pair: int) -> Path:
    """Where the logits of one pair and part lie."""
    return folder / PARTS / f"{name}.pair{pair}.npy"


def write_record(path: Path, record: Contents | Part | Manifest) -> None:
    """Write it as JSON, whole or not at all."""
    with AtomicFile(path) as file:
        file.write(json.dumps(asdict(record), indent=1).encode() + b"\n")


def read_record(kind: type[_Record], path: Path, advice: str) -> _Record:
    """Read what `write_record` wrote. Raises StoreError naming the file, what is wrong with it, and `advice`."""
    try:
        record: _Record = TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as err:
        raise StoreError(f"{path}: cannot be read ({err.strerror})") from err
    except ValidationError as err:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors(include_input=False, include_url=False)[:3])
        raise StoreError(f"{path}: damaged ({told}); {advice}") from None
    return record


def read_manifest(folder: Path) -> Manifest:
    """The manifest, with parts that follow one another and files of the right size. Raises StoreError."""
    path = folder / MANIFEST
    if not path.exists():
        begun = (folder / CONTENTS).exists()
        told = "the export has not ended; run the same `m2mkd teacher-export` again, it goes on" if begun else "no stored logits lie here"
        raise StoreError(f"{folder}: {told} ({MANIFEST} is missing)")
    manifest = read_record(Manifest, path, "delete it and run the same `m2mkd teacher-export` again, which keeps finished parts")
    if manifest.contents.version != FORMAT_VERSION:
        raise StoreError(f"{path}: version is {manifest.contents.version}, this m2mkd_ds reads {FORMAT_VERSION}; export again")
    at = manifest.contents.start
    for part in manifest.parts:
        if part.start != at or part.stop <= part.start or [file.pair for file in part.files] != list(manifest.contents.pairs):
            raise StoreError(f"{path}: part {part.name} does not follow position {at} with pairs {list(manifest.contents.pairs)}")
        at = part.stop
        for file in part.files:
            check_size(folder, manifest.contents, part, file)
    return manifest


def check_size(folder: Path, contents: Contents, part: Part, file: PartFile) -> None:
    """Raises StoreError for a file that is missing, or of another size than its record or its rows say."""
    path = pair_file(folder, part.name, file.pair)
    size = path.stat().st_size if path.exists() else None
    if size != file.bytes:
        raise StoreError(f"{path}: {'missing' if size is None else f'{size} bytes'}, its record says {file.bytes}; {AGAIN}")
    if file.bytes != npy_bytes((part.stop - part.start, contents.classes), contents.dtype):
        raise StoreError(f"{path}: {file.bytes} bytes do not hold {part.stop - part.start} rows of {contents.classes} {contents.dtype}")


def check_sums(folder: Path, contents: Contents, part: Part) -> None:
    """Raises StoreError for the first file of a part whose bytes are not those that were written."""
    for file in part.files:
        check_size(folder, contents, part, file)
        path = pair_file(folder, part.name, file.pair)
        found = file_sha256(path)
        if found != file.sha256:
            raise StoreError(f"{path}: damaged, its sha256 is {found} and its record says {file.sha256}; {AGAIN}")


AGAIN = "run the same `m2mkd teacher-export` again, it makes damaged and missing parts anew"


def npy_header(shape: tuple[int, int], dtype: str) -> bytes:
    """What stands before the numbers in a .npy file."""
    description = {"descr": DTYPES[dtype][1], "fortran_order": False, "shape": shape}
    text = repr(description).encode("latin1")
    # Format 1.0: magic, version, length of the text, text; spaces and a line feed fill it up to a multiple of 64 bytes.
    length = -(-(10 + len(text) + 1) // 64) * 64 - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def npy_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Size of the whole file."""
    return len(npy_header(shape, dtype)) + shape[0] * shape[1] * DTYPES[dtype][0].itemsize


def to_bytes(logits_BV: Tensor) -> memoryview:
    """Its numbers as they lie in the file; bf16 as bits."""
    plain = logits_BV.view(torch.int16) if logits_BV.dtype == torch.bfloat16 else logits_BV
    array: Any = plain.contiguous().numpy()
    return memoryview(array.astype(array.dtype.newbyteorder("<"), copy=False)).cast("B")


def read_rows(folder: Path, contents: Contents, part: Part, pair: int, positions: range) -> Tensor:
    """Logits [B, V] of positions inside `part`, in the stored dtype. Raises StoreError.

    Reads instead of mapping the file: a file that is cut short while it is mapped kills the process without a word.
    """
    path = pair_file(folder, part.name, pair)
    dtype, on_disk = DTYPES[contents.dtype]
    shape = (part.stop - part.start, contents.classes)
    offset = len(npy_header(shape, contents.dtype)) + (positions.start - part.start) * contents.row_bytes()
    try:
        numbers = np.fromfile(path, dtype=on_disk, count=len(positions) * contents.classes, offset=offset)
    except OSError as err:
        raise StoreError(f"{path}: cannot be read ({err.strerror})") from err
    if numbers.size != len(positions) * contents.classes:
        raise StoreError(f"{path}: ends before row {positions.stop - part.start}; {AGAIN}")
    native = numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
    tensor = torch.from_numpy(native.view(np.int16)).view(dtype) if dtype == torch.bfloat16 else torch.from_numpy(native)
    return tensor.view(len(positions), contents.classes)


def check_prints(expected: Mapping[str, str], stored: Mapping[str, str], where: str) -> None:
    """Raises StoreError naming the first field in which the run differs from what was exported, and both values.

    A run may expect less than was stored (one pair of several), never more.
    """
    for name, ours in expected.items():
        if stored.get(name) != ours:
            raise StoreError(
                f"{where}: {name}: this run has {ours}, the stored logits were made with {stored.get(name)}; give the run what they were "
                "made with, or export into another folder"
            )


def covering(parts: Sequence[Part], positions: range) -> list[tuple[int, range]]:
    """(number of the part, positions in it) of the parts that hold `positions`, in order; `parts` follow one another."""
    number = bisect_right(parts, positions.start, key=lambda part: part.start) - 1
    found = []
    while 0 <= number < len(parts) and parts[number].start < positions.stop:
        found.append((number, range(max(parts[number].start, positions.start), min(parts[number].stop, positions.stop))))
        number += 1
    return found

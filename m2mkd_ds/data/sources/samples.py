"""What shards are made from: labelled image files that are read or made only when they are asked for.

A collection may be larger than memory, and parts of it travel to other processes, so a `Samples` holds places (paths, offsets, rows)
rather than images; `subset` keeps the places of some samples, and `name_of` says in a message where a sample comes from.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from m2mkd_ds.data.order import permutation


class Sample(NamedTuple):
    """One labelled image file."""

    image: bytes
    """The encoded file."""
    extension: str
    """jpg | jpeg | png | webp."""
    label: int
    key: str
    """Unique; letters, digits, - _ and /; no dot, because webdataset takes what follows the first dot for the field."""
    info: Mapping[str, Any] | None = None
    """Further entries of the sample's JSON."""


class Samples(Protocol):
    """A fixed sequence of samples. Implementations can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Sample:
        """Sample `number`, read or made now. Raises OSError or ShardError when it cannot be had."""
        ...

    def name_of(self, number: int) -> str:
        """Where sample `number` comes from, for messages."""
        ...

    def subset(self, numbers: np.ndarray) -> Samples:
        """Samples `numbers` [n], in this order."""
        ...


class ListSamples:
    """Samples that are in memory already."""

    def __init__(self, samples: Sequence[tuple[Any, ...]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Sample:
        return Sample(*self._samples[number])

    def name_of(self, number: int) -> str:
        return f"sample of key {self._samples[number][3]!r}"

    def subset(self, numbers: np.ndarray) -> ListSamples:
        return ListSamples([self._samples[number] for number in numbers.tolist()])


class ArrayImages:
    """PNG files of rows `ids` [n] of a uint8 array [N, H, W] or [N, H, W, 3]; keys are PREFIX-<row>."""

    def __init__(self, images: np.ndarray, labels_N: np.ndarray, ids: np.ndarray, prefix: str) -> None:
        # Only the rows at hand: a subset sent to another process stays small.
        self._images, self._labels, self._ids, self._prefix = images[ids], labels_N[ids], ids, prefix

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: int) -> Sample:
        return Sample(encode_png(self._images[number]), "png", int(self._labels[number]), self._key(number))

    def _key(self, number: int) -> str:
        return f"{self._prefix}-{self._ids[number]:06d}"

    def name_of(self, number: int) -> str:
        return f"image {self._key(number)}"

    def subset(self, numbers: np.ndarray) -> ArrayImages:
        part = object.__new__(ArrayImages)
        part._images, part._labels = self._images[numbers], self._labels[numbers]
        part._ids, part._prefix = self._ids[numbers], self._prefix
        return part


class FileImages:
    """Image files (path below `root`, label), bytes as they are; keys are <number>-<file name>."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]], numbers: np.ndarray | None = None) -> None:
        self._root, self._files = root, files
        self._numbers = np.arange(len(files)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Sample:
        name, label = self._files[number]
        path = self._root / name
        key = numbered_key(int(self._numbers[number]), path.stem)
        return Sample(path.read_bytes(), path.suffix[1:].lower(), label, key, {"file": name})

    def name_of(self, number: int) -> str:
        return str(self._root / self._files[number][0])

    def subset(self, numbers: np.ndarray) -> FileImages:
        return FileImages(self._root, [self._files[number] for number in numbers.tolist()], self._numbers[numbers])


def stat_hash(root: Path, files: Sequence[tuple[str, int]]) -> str:
    """Names the content of files (path below `root`, label) by their names, labels, sizes and times, without reading them."""
    digest = hashlib.sha256()
    for name, label in files:
        stat = (root / name).stat()
        digest.update(f"{name} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageSplit:
    """Samples, and a text that names their content."""

    samples: Samples
    content: str


@dataclass(frozen=True)
class ImageSource:
    """A labelled collection in two parts."""

    name: str
    license: str
    class_names: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit
    documents: Mapping[str, str] = field(default_factory=dict)
    """Text files that have to lie beside the shards, by name."""


def numbered_key(number: int, name: str) -> str:
    """A key that is unique by its number and can still be read: `00000012-n01440764_10026`."""
    return f"{number:08d}-{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:60]}"


def encode_png(pixels_HW: np.ndarray) -> bytes:
    """A uint8 grey [H, W] or RGB [H, W, 3] image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, format="PNG")
    return file.getvalue()


def stratified_split(labels_N: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train ids, validation ids), ascending; every class gives round(share * its size) samples to validation, and at least one of two."""
    held_out = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        ids = np.flatnonzero(labels_N == label)
        count = round(share * len(ids)) or int(len(ids) > 1 and share > 0)
        held_out[ids[permutation(seed, int(label), len(ids))[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)

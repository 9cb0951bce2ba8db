"""Image collections that shards can be made from: scikit-learn's digits, Fashion-MNIST, and any folder of class folders.

`make_source(name, out)` writes out/train and out/validation. Splits are fixed: Fashion-MNIST's own, a folder's own, or
stratified by class and seed.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.fashion_mnist import CLASS_NAMES, PINNED_SHA256, fashion_mnist_arrays
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.order import permutation
from m2mkd_ds.data.shards import Sample, write_shards

SOURCES = ("digits", "fashion_mnist", "image_folder")
DIGITS_VALIDATION_SHARE = 0.2
FOLDER_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class ImageSplit:
    """A sequence of samples, encoded or read only when asked for, and a hash that names them."""

    samples: Sequence[Sample]
    content: str


@dataclass(frozen=True)
class ImageSource:
    """A labelled collection."""

    name: str
    license: str
    class_names: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit


def make_source(
    name: str,
    out: str | Path,
    *,
    path: str | Path | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    samples_per_shard: int = 5000,
) -> tuple[ShardIndex, ShardIndex]:
    """Write OUT/train and OUT/validation of a named source and return their indices; complete folders are kept.

    `path`: the folder of `image_folder`, or a local copy of Fashion-MNIST's .gz files. `cache`: where downloads stay
    (default OUT/download). Raises ShardError for an unknown name or data that cannot be had.
    """
    folder = Path(out)
    if name == "digits":
        source = digits(seed)
    elif name == "fashion_mnist":
        source = fashion_mnist(Path(cache) if cache else folder / "download", local=Path(path) if path else None)
    elif name == "image_folder" and path:
        source = image_folder(Path(path), seed)
    else:
        hint = "image_folder needs the path of a folder" if name == "image_folder" else f"allowed is {' | '.join(SOURCES)}"
        raise ShardError(f"data source {name!r}: {hint}")
    indices = [
        write_shards(
            split.samples,
            folder / split_name,
            total=len(split.samples),
            class_names=source.class_names,
            source=source.name,
            license=source.license,
            samples_per_shard=samples_per_shard,
            seed=seed,
            content=split.content,
        )
        for split_name, split in (("train", source.train), ("validation", source.validation))
    ]
    return indices[0], indices[1]


def digits(seed: int = 0) -> ImageSource:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, 10 classes, a fifth of each class for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise ShardError(f"source digits needs scikit-learn ({err}); install it with `pip install scikit-learn`") from err
    bunch = load_digits()
    # Pixel values run from 0 to 16.
    images_NHW = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels_N = bunch.target.astype(np.int64)
    train_ids, validation_ids = stratified_split(labels_N, DIGITS_VALIDATION_SHARE, seed)
    content = hashlib.sha256(images_NHW.tobytes() + labels_N.tobytes()).hexdigest()

    def split(ids: np.ndarray) -> ImageSplit:
        return ImageSplit(ArrayImages(images_NHW, labels_N, ids, "digit"), f"{content} split seed {seed}")

    names = tuple(str(digit) for digit in range(10))
    return ImageSource("digits", "BSD-3-Clause", names, split(train_ids), split(validation_ids))


def fashion_mnist(cache: Path, *, local: Path | None = None) -> ImageSource:
    """Fashion-MNIST: 60,000 + 10,000 grey images of 28x28, 10 classes, MIT. See `fashion_mnist_arrays` for where from."""
    arrays = fashion_mnist_arrays(cache, local=local)

    def split(part: str) -> ImageSplit:
        images_NHW, labels_N = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"].astype(np.int64)
        prefix = "train" if part == "train" else "test"
        pinned = PINNED_SHA256[f"{part}-images-idx3-ubyte"]
        return ImageSplit(ArrayImages(images_NHW, labels_N, np.arange(len(labels_N)), prefix), pinned)

    return ImageSource("fashion_mnist", "MIT", CLASS_NAMES, split("train"), split("t10k"))


def image_folder(root: Path, seed: int = 0) -> ImageSource:
    """ROOT/train/CLASS/*.jpg|png with ROOT/val or ROOT/validation beside it, or ROOT/CLASS/* (a tenth is held out).

    Bytes are passed through. `content` covers names, sizes and times of the files, not their bytes.
    """
    train = root / "train"
    validation = next((root / name for name in ("validation", "val") if (root / name).is_dir()), None)
    if train.is_dir() and validation is not None:
        class_names = _class_folders(train)
        if _class_folders(validation) != class_names:
            raise ShardError(f"{validation} and {train} hold different class folders; both need the same names")
        splits = [_list_files(train, class_names), _list_files(validation, class_names)]
    else:
        class_names = _class_folders(root)
        files = _list_files(root, class_names)
        ids = stratified_split(np.array([label for _, label in files]), FOLDER_VALIDATION_SHARE, seed)
        splits = [[files[i] for i in part] for part in ids]
    train_split, validation_split = (ImageSplit(FileImages(root, files), _stat_hash(root, files)) for files in splits)
    return ImageSource(f"image_folder:{root.name}", "unknown", class_names, train_split, validation_split)


def stratified_split(labels_N: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train ids, validation ids), ascending; every class gives round(share * its size) samples to validation."""
    held_out = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        ids = np.flatnonzero(labels_N == label)
        held_out[ids[permutation(seed, int(label), len(ids))[: round(share * len(ids))]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class _LazySamples(Sequence[Sample]):
    """Samples made when they are asked for: a collection may be larger than memory."""

    def __init__(self, count: int, make: Callable[[int], Sample]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, item: int) -> Sample: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[Sample]: ...
    def __getitem__(self, item: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(item, slice):
            return [self._make(i) for i in range(self._count)[item]]
        return self._make(range(self._count)[item])


class ArrayImages(_LazySamples):
    """PNG files of rows `ids` of a uint8 array [N, H, W]; keys are PREFIX-<row>."""

    def __init__(self, images_NHW: np.ndarray, labels_N: np.ndarray, ids: np.ndarray, prefix: str) -> None:
        def make(number: int) -> Sample:
            row = int(ids[number])
            return Sample(encode_png(images_NHW[row]), "png", int(labels_N[row]), f"{prefix}-{row:06d}")

        super().__init__(len(ids), make)


class FileImages(_LazySamples):
    """Image files (path, label) under `root`, bytes as they are; keys are <number>-<file name>."""

    def __init__(self, root: Path, files: Sequence[tuple[Path, int]]) -> None:
        def make(number: int) -> Sample:
            path, label = files[number]
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)[:60]
            return Sample(path.read_bytes(), path.suffix[1:].lower(), label, f"{number:08d}-{stem}")

        super().__init__(len(files), make)


def encode_png(pixels_HW: np.ndarray) -> bytes:
    """A uint8 grey [H, W] or RGB [H, W, 3] image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, format="PNG")
    return file.getvalue()


_SUFFIXES = (".jpg", ".jpeg", ".png")


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; image_folder needs ROOT/CLASS/*.jpg or ROOT/train/CLASS/*.jpg")
    names = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
    if not names:
        raise ShardError(f"{root}: holds no class folders; image_folder needs ROOT/CLASS/*.jpg or ROOT/train/CLASS/*.jpg")
    return names


def _list_files(root: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """All image files, in a fixed order. Files of other kinds are refused, because leaving them out would go unseen."""
    files = []
    for label, name in enumerate(class_names):
        for path in sorted((root / name).rglob("*")):
            if path.is_file():
                if path.suffix.lower() not in _SUFFIXES:
                    raise ShardError(f"{path}: not one of {', '.join(_SUFFIXES)}; remove it or convert it")
                files.append((path, label))
    return files


def _stat_hash(root: Path, files: Sequence[tuple[Path, int]]) -> str:
    digest = hashlib.sha256()
    for path, label in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(root)} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()

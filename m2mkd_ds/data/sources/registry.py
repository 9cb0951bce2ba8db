"""Image collections that shards can be made from, by name. `make_source(name, out)` writes out/train and out/validation.

Splits are fixed: the collection's own, or held out by class (icons: by icon set) and seed. Each source but the smallest has a file of
its own, and all give an `ImageSource`; what a name takes is listed in `source_options.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shards.interop import write_interop
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.source_options import SourceName, SourceOptions, check_options
from m2mkd_ds.data.sources.cifar100 import cifar100
from m2mkd_ds.data.sources.cub import cub
from m2mkd_ds.data.sources.fashion_mnist import CLASS_NAMES, PINNED_SHA256, fashion_mnist_arrays
from m2mkd_ds.data.sources.hf_dataset import hf_dataset
from m2mkd_ds.data.sources.icons import icons
from m2mkd_ds.data.sources.image_folder import image_folder
from m2mkd_ds.data.sources.samples import ArrayImages, ImageSource, ImageSplit, encode_png, stratified_split
from m2mkd_ds.data.sources.tars import tars

__all__ = ["SOURCES", "digits", "encode_png", "fashion_mnist", "image_folder", "make_source", "stratified_split"]

DIGITS_VALIDATION_SHARE = 0.2


def make_source(
    name: str,
    out: str | Path,
    *,
    path: str | Path | None = None,
    cache: str | Path | None = None,
    options: SourceOptions | None = None,
    seed: int = 0,
    samples_per_shard: int = 5000,
    resize_short: int = 0,
    quality: int = 90,
    workers: int = 1,
) -> tuple[ShardIndex, ShardIndex]:
    """Write OUT/train and OUT/validation of a named source and return their indices; what is there already is kept.

    `path` and `cache` are the fields of `options` that are used most. `seed` shuffles, and splits where the source has no split.
    The rest is as in `write_shards`. Raises ShardError for an unknown name, options that do not fit it, or data that cannot be had.
    """
    folder = Path(out)
    options = options or SourceOptions()
    if path is not None:
        options = replace(options, path=Path(path))
    if cache is not None:
        options = replace(options, cache=Path(cache))
    known = check_options(name, options)
    source = SOURCES[known](replace(options, cache=options.cache or folder / "download"), seed)
    if not (len(source.train.samples) and len(source.validation.samples)):
        raise ShardError(
            f"{source.name}: {len(source.train.samples)} training and {len(source.validation.samples)} validation images; both parts need "
            "some, give more images or a validation part of its own"
        )
    _write_documents(folder, source.documents)
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
            resize_short=resize_short,
            quality=quality,
            workers=workers,
        )
        for split_name, split in (("train", source.train), ("validation", source.validation))
    ]
    write_interop(folder)
    return indices[0], indices[1]


def _write_documents(folder: Path, documents: Mapping[str, str]) -> None:
    """Files that must lie beside the shards. One of the same name and another content is somebody's, and is not replaced."""
    for name, text in documents.items():
        path = folder / name
        if path.exists() and path.read_text() != text:
            raise ShardError(f"{path}: has another content than these shards need; choose another folder for them")
        folder.mkdir(parents=True, exist_ok=True)
        with AtomicFile(path) as file:
            file.write(text.encode())


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


def _fashion_mnist(options: SourceOptions, seed: int) -> ImageSource:
    assert options.cache is not None, "make_source fills it in"
    return fashion_mnist(options.cache, local=options.path)


def _image_folder(options: SourceOptions, seed: int) -> ImageSource:
    assert options.path is not None, "check_options asks for it"
    return image_folder(options.path, seed, share=options.validation_share)


SOURCES: dict[SourceName, Callable[[SourceOptions, int], ImageSource]] = {
    "digits": lambda options, seed: digits(seed),
    "fashion_mnist": _fashion_mnist,
    "cifar100": cifar100,
    "cub": cub,
    "icons": icons,
    "image_folder": _image_folder,
    "tar": tars,
    "hf": hf_dataset,
}
"""Every source: (options with `cache` filled in, seed) -> the collection."""

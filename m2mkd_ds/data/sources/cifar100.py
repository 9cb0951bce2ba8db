"""Source `cifar100` (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, 100 fine classes.

Read from the archive's *binary* version, because the python version is a pickle. A record is a byte of coarse label, a byte of fine
label, and the planes R, G, B of 32x32 bytes each.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import numpy as np

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.archives import archive_files, check_digest, fetch
from m2mkd_ds.data.sources.samples import ArrayImages, ImageSource, ImageSplit

ARCHIVE = "cifar-100-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "03b5dce01913d631647c71ecec9e9cb8"
"""Of the archive, as its authors publish it."""
FILES = ("train.bin", "test.bin", "fine_label_names.txt")
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE


def cifar100(options: SourceOptions, seed: int = 0) -> ImageSource:
    """The archive at `options.path` (the file or its folder), or fetched into the cache. Raises ShardError when it is another file."""
    if options.path is not None:
        archive = options.path / ARCHIVE if options.path.is_dir() else options.path
        if not archive.is_file():
            raise ShardError(f"{archive}: no such file; cifar100 needs {ARCHIVE}, the binary version (the python one is a pickle)")
        check_digest(archive, "md5", MD5)
    else:
        assert options.cache is not None, "make_source fills it in"
        archive = fetch(URL, options.cache / ARCHIVE, "md5", MD5)
    return read_cifar100(archive)


def read_cifar100(archive: Path) -> ImageSource:
    """The collection in an archive of CIFAR-100's binary layout. Raises ShardError when a file is missing or has half a record."""
    found = {PurePosixPath(name).name: data for name, data in archive_files(archive, lambda name: PurePosixPath(name).name in FILES)}
    missing = [name for name in FILES if name not in found]
    if missing:
        raise ShardError(f"{archive}: lacks {', '.join(missing)}; expected the binary version of CIFAR-100")
    class_names = tuple(found["fine_label_names.txt"].decode().split())
    train, test = (_split(archive, name, found[name], len(class_names)) for name in FILES[:2])
    return ImageSource("cifar100", "unknown (Krizhevsky 2009, to be cited; no licence is given)", class_names, train, test)


def _split(archive: Path, name: str, data: bytes, num_classes: int) -> ImageSplit:
    if len(data) % RECORD:
        raise ShardError(f"{archive}: {name} has {len(data)} bytes, which is not a multiple of a record's {RECORD}")
    records_NB = np.frombuffer(data, dtype=np.uint8).reshape(-1, RECORD)
    labels_N = records_NB[:, 1].astype(np.int64)
    if len(labels_N) and labels_N.max() >= num_classes:
        raise ShardError(f"{archive}: {name} has label {labels_N.max()}, but there are {num_classes} class names")
    images_NHWC = records_NB[:, 2:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    ids = np.arange(len(labels_N))
    return ImageSplit(ArrayImages(images_NHWC, labels_N, ids, name.removesuffix(".bin")), hashlib.sha256(data).hexdigest())

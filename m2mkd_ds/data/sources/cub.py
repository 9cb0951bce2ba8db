"""Source `cub`: CUB-200-2011 (Wah et al. 2011), 11,788 photos of 200 kinds of birds, with the authors' split. Bytes are passed through.

Four text files say it all, a line an entry: images.txt (id, path), image_class_labels.txt (id, class from 1),
train_test_split.txt (id, 1 for training), classes.txt (class, name).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.archives import unpack
from m2mkd_ds.data.sources.samples import FileImages, ImageSource, ImageSplit, stat_hash

FOLDER = "CUB_200_2011"
TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def cub(options: SourceOptions, seed: int = 0) -> ImageSource:
    """The folder at `options.path`, or its .tgz, which is unpacked into the cache. Raises ShardError when the tables do not fit."""
    assert options.path is not None and options.cache is not None, "checked and filled in by make_source"
    root = options.path
    if root.is_file():
        root = unpack(root, options.cache / FOLDER, _is_needed)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    if missing := [name for name in TABLES if not (root / name).is_file()]:
        raise ShardError(f"{root}: lacks {', '.join(missing)}; cub needs the folder {FOLDER} or its .tgz")
    paths, labels, splits, classes = (_table(root / name) for name in TABLES)
    for table, name in ((labels, TABLES[1]), (splits, TABLES[2])):
        if table.keys() != paths.keys():
            raise ShardError(f"{root}: {name} and {TABLES[0]} have different image ids; unpack the archive again")
    class_names = tuple(classes[str(number)] for number in range(1, len(classes) + 1) if str(number) in classes)
    if len(class_names) != len(classes) or not set(labels.values()) <= classes.keys():
        raise ShardError(f"{root / TABLES[3]}: classes must be numbered 1, 2, ... and every label of {TABLES[1]} must be among them")
    train, validation = (
        _split(root, [(f"images/{path}", int(labels[image]) - 1) for image, path in paths.items() if splits[image] == is_train])
        for is_train in ("1", "0")
    )
    return ImageSource("cub", "unknown (images from the web, for research only)", class_names, train, validation)


def _is_needed(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[:1] == (FOLDER,) and (parts[1:2] == ("images",) or parts[1:] in [(table,) for table in TABLES])


def _split(root: Path, files: Sequence[tuple[str, int]]) -> ImageSplit:
    for name, _ in files:
        if ".." in PurePosixPath(name).parts or not (root / name).is_file():
            raise ShardError(f"{root / name}: no such image, but {TABLES[0]} lists it; unpack the archive again")
    return ImageSplit(FileImages(root, files), stat_hash(root, files))


def _table(path: Path) -> dict[str, str]:
    """`id value` a line."""
    pairs = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    bad = next((pair for pair in pairs if len(pair) != 2), None)
    if bad is not None:
        raise ShardError(f"{path}: has a line {' '.join(bad)!r}; expected an id and a value")
    return dict(pairs)

"""Source `tar`: webdataset shards that somebody else wrote, shuffled anew and cut to our size. Bytes are passed through.

Each tar is read once to learn where its samples lie; while writing, images are read from those places. A sample keeps its label; its
key gets a number in front, and the JSON says the key and the tar that it had. Other members of a sample are left out.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import braceexpand  # comes with webdataset
import numpy as np

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import INDEX_NAME
from m2mkd_ds.data.shards.scan import scan_shard
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.samples import ImageSource, ImageSplit, Sample, numbered_key, stratified_split
from m2mkd_ds.logs import progress

VALIDATION_SHARE = 0.1


class Place(NamedTuple):
    """Where an image lies."""

    tar: int
    offset: int
    size: int
    label: int
    key: str
    extension: str


class TarImages:
    """Images at `places` in `paths`, read when they are asked for; keys are <number>-<their key>."""

    def __init__(self, paths: Sequence[Path], places: Sequence[Place], numbers: np.ndarray | None = None) -> None:
        self._paths, self._places = paths, places
        self._numbers = np.arange(len(places)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Sample:
        place = self._places[number]
        path = self._paths[place.tar]
        with path.open("rb") as file:
            file.seek(place.offset)
            image = file.read(place.size)
        if len(image) != place.size:
            raise ShardError(f"{self.name_of(number)}: the tar ends inside this image; it was changed while it was read")
        key = numbered_key(int(self._numbers[number]), place.key)
        return Sample(image, place.extension, place.label, key, {"original_key": place.key, "original_tar": path.name})

    def name_of(self, number: int) -> str:
        place = self._places[number]
        return f"{self._paths[place.tar]}, key {place.key}"

    def subset(self, numbers: np.ndarray) -> TarImages:
        return TarImages(self._paths, [self._places[number] for number in numbers.tolist()], self._numbers[numbers])


def tars(options: SourceOptions, seed: int = 0) -> ImageSource:
    """The tars of `train_tars` and `validation_tars`. Raises ShardError when a pattern fits nothing, a tar is damaged, or classes lack."""
    assert options.train_tars is not None, "check_options asks for it"
    paths = expand(options.train_tars, "train_tars")
    train, train_hash = _scan(paths, "reading training tars")
    if options.validation_tars is not None:
        if options.validation_share is not None:
            raise ShardError("validation_tars and validation_share exclude each other; leave one out")
        validation_paths = expand(options.validation_tars, "validation_tars")
        if both := set(paths) & set(validation_paths):
            raise ShardError(f"{min(both)}: is in train_tars and in validation_tars; every tar must be in one of them")
        validation, validation_hash = _scan(validation_paths, "reading validation tars")
    else:
        labels_N = np.array([place.label for place in train], dtype=np.int64)
        ids = stratified_split(labels_N, options.validation_share or VALIDATION_SHARE, seed)
        train_hash = validation_hash = f"{train_hash} split {options.validation_share or VALIDATION_SHARE} seed {seed}"
        validation_paths, (train, validation) = paths, ([train[i] for i in part] for part in ids)
    labels = {place.label for place in (*train, *validation)}
    class_names = _class_names(options.class_names, paths, max(labels, default=-1) + 1)
    splits = ImageSplit(TarImages(paths, train), train_hash), ImageSplit(TarImages(validation_paths, validation), validation_hash)
    return ImageSource(f"tar:{paths[0].parent.name}", "unknown", class_names, *splits)


def expand(pattern: str, option: str) -> list[Path]:
    """The tars that a file name, a folder, or a pattern with `{a..b}`, `{x,y}`, `*` and `?` means, in a fixed order."""
    if Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern)}/*.tar"
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as err:
        raise ShardError(f"{option} is {pattern!r}: its braces are not balanced") from err
    paths: list[Path] = []
    for name in names:
        found = sorted(Path(path) for path in glob.glob(name)) or [Path(name)]
        if missing := [path for path in found if not path.is_file()]:
            raise ShardError(f"{option} is {pattern!r}: {missing[0]} is no file; give local tars, a folder of them or a pattern in quotes")
        paths += [path for path in found if path not in paths]
    return paths


def _scan(paths: Sequence[Path], what: str) -> tuple[list[Place], str]:
    """Every image of the tars, and a hash of the tars' contents."""
    places, digest = [], hashlib.sha256()
    for tar, path in enumerate(progress(paths, total=len(paths), what=what)):
        record, rows = scan_shard(path)
        digest.update(record.sha256.encode())
        places += [Place(tar, row.offset, row.size, row.label, row.key, row.extension) for row in rows]
    return places, digest.hexdigest()


def _class_names(file: Path | None, paths: Sequence[Path], needed: int) -> tuple[str, ...]:
    """From the file, from our index beside the tars, or the numbers."""
    index = paths[0].parent / INDEX_NAME
    if file is not None:
        if not file.is_file():
            raise ShardError(f"{file}: no such file; class_names needs a text file with a name a line")
        names, where = tuple(line.strip() for line in file.read_text().splitlines() if line.strip()), file
    elif index.is_file():
        names, where = tuple(json.loads(index.read_text())["class_names"]), index
    else:
        return tuple(str(label) for label in range(needed))
    if len(names) < needed:
        raise ShardError(f"{where}: has {len(names)} class names, but the labels run to {needed - 1}")
    return names

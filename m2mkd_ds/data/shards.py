"""Writing webdataset shards.

Samples are shuffled once by the seed, so that any prefix of the shards is a fair sample; members are written by
webdataset's TarWriter with fixed times, owners and modes, so equal input gives equal bytes. A shard appears under its
name only when it is complete and on disk, and index.json comes last: a folder without it is unfinished.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset import TarWriter

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import FORMAT, INDEX_NAME, TABLE_NAME, ShardIndex, table_dtype, write_index
from m2mkd_ds.data.order import permutation
from m2mkd_ds.data.scan import ShardRow as ShardRow
from m2mkd_ds.data.scan import scan_shard as scan_shard
from m2mkd_ds.logs import progress

logger = logging.getLogger("m2mkd_ds")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
MAX_KEY_LENGTH = 90
"""A tar header of the plain (ustar) kind has 100 bytes for KEY.json."""


class Sample(NamedTuple):
    """One labelled image file."""

    image: bytes
    """The encoded file; written as it is."""
    extension: str
    """jpg | jpeg | png."""
    label: int
    key: str
    """Unique; letters, digits, - _ and /; no dot, because webdataset takes what follows the first dot for the field."""


def write_shards(
    samples: Sequence[tuple[bytes, str, int, str]],
    out: str | Path,
    *,
    total: int,
    class_names: Sequence[str],
    source: str,
    license: str,
    samples_per_shard: int = 5000,
    seed: int = 0,
    content: str = "",
) -> ShardIndex:
    """Write `samples` (image, extension, label, key), shuffled by `seed`, and their index into folder `out`.

    `content` names the input (a hash of it): a complete folder that was written from the same content with the same
    arguments is kept as it is. Raises ShardError for bad samples, for a `total` that is not their number, and for a
    folder that holds other shards; OSError for a full disk.
    """
    folder = Path(out)
    if len(samples) != total:
        raise ShardError(f"total is {total}, but there are {len(samples)} samples; nothing was written to {folder}")
    if samples_per_shard < 1:
        raise ShardError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    request = {
        "format": FORMAT,
        "source": source,
        "license": license,
        "class_names": list(class_names),
        "total": total,
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        "content": content,
    }
    if (folder / INDEX_NAME).exists():
        return _keep_complete(folder, request)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    order = permutation(seed, 0, total)
    checked = _checked(samples, order, class_names, folder)
    stream = progress(checked, total=total, what=f"shards {source} -> {folder.name}")
    records, rows = [], []
    for number in range(math.ceil(total / samples_per_shard)):
        path = folder / f"shard-{number:06d}.tar"
        with AtomicFile(path) as file, TarWriter(file, mtime=0, encoder=False) as tar:
            for sample in itertools.islice(stream, samples_per_shard):
                tar.write(_members(sample, class_names))
        # Read back what was written: the index then describes the file, not what we meant to write.
        record, shard_rows = scan_shard(path)
        records.append(record)
        rows += [(number, *row) for row in shard_rows]
    next(stream, None)  # islice stops before the end is seen: this lets the progress bar finish
    table = _table(rows)
    write_index(folder, records, table, class_names=class_names, source=source, license=license, request=request)
    logger.info("%s: %d samples of %d classes in %d shards", folder, total, len(class_names), len(records))
    return ShardIndex.load(folder)


def _table(rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    width = max((len(row[5]) for row in rows), default=1)
    return np.array([(*row[:5], row[5].encode(), row[6].encode()) for row in rows], dtype=table_dtype(width))


def _members(sample: Sample, class_names: Sequence[str]) -> dict[str, Any]:
    """The webdataset sample of one image."""
    info = {"key": sample.key, "label": sample.label, "class_name": class_names[sample.label]}
    return {
        "__key__": sample.key,
        sample.extension: sample.image,
        "cls": str(sample.label).encode(),
        "json": json.dumps(info).encode(),
    }


_KEY = re.compile(rf"[A-Za-z0-9_/-]{{1,{MAX_KEY_LENGTH}}}")


def _checked(
    samples: Sequence[tuple[bytes, str, int, str]], order: np.ndarray, class_names: Sequence[str], folder: Path
) -> Iterator[Sample]:
    """The samples in writing order, each refused when it could not be read back."""
    seen: set[str] = set()
    for number in order.tolist():
        sample = Sample(*samples[number])
        where = f"sample {number} (key {sample.key!r}) for {folder}"
        if not _KEY.fullmatch(sample.key) or sample.key in seen:
            raise ShardError(f"{where}: the key must be unique, of 1 to {MAX_KEY_LENGTH} letters, digits, - _ and /")
        if sample.extension not in IMAGE_EXTENSIONS:
            raise ShardError(f"{where}: extension is {sample.extension!r}; allowed is {', '.join(IMAGE_EXTENSIONS)}")
        if not 0 <= sample.label < len(class_names):
            raise ShardError(f"{where}: label is {sample.label}; there are {len(class_names)} classes, numbered from 0")
        seen.add(sample.key)
        yield sample


def _keep_complete(folder: Path, request: dict[str, Any]) -> ShardIndex:
    """The folder is complete: the same request keeps it, another one is refused (nobody's shards are overwritten)."""
    index = ShardIndex.load(folder)
    differing = [key for key in request if request[key] != index.request.get(key)]
    if not request["content"] and not differing:
        differing = ["content (not given)"]
    if differing:
        raise ShardError(f"{folder} holds other shards, they differ in {', '.join(differing)}; remove the folder or choose another one")
    logger.info("%s: kept, %d samples are there already", folder, index.num_samples)
    return index


def _remove_unfinished(folder: Path) -> None:
    """Without index.json, shards are left from a run that stopped; plain webdataset would read stale ones."""
    for stale in (*folder.glob("shard-*.tar*"), *folder.glob(f"{TABLE_NAME}*"), *folder.glob(f"{INDEX_NAME}.*.tmp")):
        stale.unlink()

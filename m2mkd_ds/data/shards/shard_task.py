"""Writing one shard, wherever the process runs: its samples are fetched, made smaller if asked for, checked, packed, and read back.

Members are written by webdataset's TarWriter with fixed times, owners and modes, so equal samples give equal bytes. The shard appears
under its name only when it is complete and on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardRecord
from m2mkd_ds.data.shards.reencode import Reencoder
from m2mkd_ds.data.shards.scan import READABLE_EXTENSIONS, ShardRow, scan_shard
from m2mkd_ds.data.sources.samples import Sample, Samples

MAX_KEY_LENGTH = 90
"""A tar header of the plain (ustar) kind has 100 bytes for KEY.json."""
KEY_RULE = f"the key must be unique, of 1 to {MAX_KEY_LENGTH} letters, digits, - _ and /"

_KEY = re.compile(rf"[A-Za-z0-9_/-]{{1,{MAX_KEY_LENGTH}}}")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    number: int
    path: Path
    samples: Samples
    class_names: Sequence[str]
    reencoder: Reencoder | None
    """None: bytes are passed through."""


@dataclass(frozen=True)
class ShardDone:
    """A shard that is on disk, described as it was read back."""

    number: int
    record: ShardRecord
    rows: Sequence[ShardRow]


def write_shard(task: ShardTask, advance: Callable[[int], None]) -> ShardDone:
    """Write the shard of `task`, unless a whole one is there already; `advance(n)` is told of every n samples done.

    Raises ShardError for a sample that cannot be read, made smaller or written, and OSError when the disk is full; `advance` may
    raise to stop the work. Nothing is left then.
    """
    kept = _whole(task)
    if kept is not None:
        advance(len(task.samples))
        return kept
    seen: set[str] = set()
    with AtomicFile(task.path) as file, TarWriter(file, mtime=0, encoder=False) as tar:
        for number in range(len(task.samples)):
            tar.write(_members(_sample(task, number, seen), task.class_names))
            advance(1)
    # The index then describes the file, not what we meant to write.
    return ShardDone(task.number, *scan_shard(task.path))


def _whole(task: ShardTask) -> ShardDone | None:
    """The shard of an earlier, stopped write, if it can be read to its end and has as many samples as it should."""
    if not task.path.exists():
        return None
    try:
        record, rows = scan_shard(task.path)
    except ShardError:
        return None
    return ShardDone(task.number, record, rows) if record.num_samples == len(task.samples) else None


def _sample(task: ShardTask, number: int, seen: set[str]) -> Sample:
    """Sample `number` as it goes into the shard, refused when it could not be read back."""
    where = task.samples.name_of(number)
    try:
        sample = task.samples[number]
    except OSError as err:
        raise ShardError(f"{where}: cannot be read ({err.strerror or err}); restore or remove it, then run the same command again") from err
    if not _KEY.fullmatch(sample.key) or sample.key in seen:
        raise ShardError(f"{where}, for {task.path}: its key is {sample.key!r}; {KEY_RULE}")
    if sample.extension not in READABLE_EXTENSIONS:
        raise ShardError(f"{where}, for {task.path}: extension is {sample.extension!r}; allowed is {', '.join(READABLE_EXTENSIONS)}")
    if not 0 <= sample.label < len(task.class_names):
        count = len(task.class_names)
        raise ShardError(f"{where}, for {task.path}: label is {sample.label}; there are {count} classes, numbered from 0")
    seen.add(sample.key)
    if task.reencoder is None:
        return sample
    try:
        image, extension = task.reencoder(sample.image, sample.extension)
    except ShardError as err:
        raise ShardError(f"{where}: {err}; repair or remove it, or leave out --resize-short") from err
    return sample._replace(image=image, extension=extension)


def _members(sample: Sample, class_names: Sequence[str]) -> dict[str, Any]:
    """The webdataset sample of one image."""
    info = {"key": sample.key, "label": sample.label, "class_name": class_names[sample.label], **(sample.info or {})}
    return {
        "__key__": sample.key,
        sample.extension: sample.image,
        "cls": str(sample.label).encode(),
        "json": json.dumps(info).encode(),
    }

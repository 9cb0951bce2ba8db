"""Writing a folder of webdataset shards with its index, so that a stopped write goes on where it was.

Samples are shuffled once by the seed, so that any prefix of the shards is a fair sample. Order of events:

    writing.json        the request; a folder that holds it is ours and unfinished
    shard-000000.tar    ... each complete or not there
    index.npy, index.json
    writing.json is removed

A folder begun for the same request keeps its whole shards; one begun for another is begun anew. Files of other names are never touched.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m2mkd_ds.data.atomic import AtomicFile, only_writer
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import FORMAT, INDEX_NAME, TABLE_NAME, ShardIndex, write_index
from m2mkd_ds.data.order import permutation
from m2mkd_ds.data.shards.interop import write_interop
from m2mkd_ds.data.shards.reencode import Reencoder
from m2mkd_ds.data.shards.scan import make_table
from m2mkd_ds.data.shards.shard_task import KEY_RULE, ShardDone, ShardTask
from m2mkd_ds.data.shards.write_pool import write_all
from m2mkd_ds.data.sources.samples import ListSamples, Samples
from m2mkd_ds.logs import Progress

logger = logging.getLogger("m2mkd_ds")

WRITING_NAME = "writing.json"


def write_shards(
    samples: Samples | Sequence[tuple[Any, ...]],
    out: str | Path,
    *,
    total: int,
    class_names: Sequence[str],
    source: str,
    license: str,
    samples_per_shard: int = 5000,
    seed: int = 0,
    content: str = "",
    resize_short: int = 0,
    quality: int = 90,
    workers: int = 1,
) -> ShardIndex:
    """Write `samples` (image, extension, label, key[, info]), shuffled by `seed`, and their index into folder `out`.

    `content` names the input (a hash of it): what was written from the same content with the same arguments is kept, whole shards of
    a stopped write too. `resize_short` > 0 makes larger images smaller (`Reencoder`). The bytes do not depend on `workers`.
    Raises ShardError for bad samples, for a `total` that is not their number, and for a folder that holds other shards; OSError for
    a full disk.
    """
    folder = Path(out)
    if len(samples) != total:
        raise ShardError(f"total is {total}, but there are {len(samples)} samples; nothing was written to {folder}")
    if samples_per_shard < 1 or workers < 1:
        raise ShardError(f"samples_per_shard is {samples_per_shard} and workers is {workers}; both must be at least 1")
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
    reencoder = None
    if resize_short:
        reencoder = Reencoder(resize_short, quality)
        request.update(resize_short=resize_short, quality=quality)
    kept = _keep_complete(folder, request)
    if kept is not None:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder, _in_use(folder)):
        _begin(folder, request)
        tasks = _plan(samples, folder, request, reencoder)
        done = _write_tasks(tasks, total, max(1, min(workers, _num_shards(request))), f"shards {source} -> {folder.name}")
        _check_keys(folder, done)
        records, table = [part.record for part in done], make_table([(part.number, *row) for part in done for row in part.rows])
        write_index(folder, records, table, class_names=class_names, source=source, license=license, request=request)
        _finish(folder)
    logger.info("%s: %d samples of %d classes in %d shards", folder, total, len(class_names), len(records))
    return ShardIndex.load(folder)


def _keep_complete(folder: Path, request: dict[str, Any]) -> ShardIndex | None:
    """A complete folder: the same request keeps it, another one is refused (nobody's shards are overwritten). None: not complete."""
    if not (folder / INDEX_NAME).exists():
        return None
    index = ShardIndex.load(folder)
    differing = [key for key in {**request, **index.request} if request.get(key) != index.request.get(key)]
    if not request["content"] and not differing:
        differing = ["content (not given)"]
    if differing:
        raise ShardError(f"{folder} holds other shards, they differ in {', '.join(differing)}; remove the folder or choose another one")
    if (folder / WRITING_NAME).exists():
        with only_writer(folder, _in_use(folder)):
            _finish(folder)
    logger.info("%s: kept, %d samples are there already", folder, index.num_samples)
    return index


def _begin(folder: Path, request: dict[str, Any]) -> None:
    """Claim the folder with writing.json, keep the shards of the same request, remove those of another one.

    Raises ShardError when shards are there that no write of ours began: they are somebody's.
    """
    marker = folder / WRITING_NAME
    ours = [*folder.glob("shard-*.tar*"), *folder.glob(f"{TABLE_NAME}*"), *folder.glob(f"{INDEX_NAME}.*.tmp")]
    if not marker.exists() and ours:
        names = ", ".join(sorted(path.name for path in ours)[:3])
        raise ShardError(
            f"{folder} holds {names} without {INDEX_NAME}, and no `shards write` that was stopped left them there ({WRITING_NAME} is "
            "missing); remove them, choose another folder, or index them with `m2mkd shards index`"
        )
    text = json.dumps(request, indent=1, sort_keys=True)
    # Without a name of the content nobody can say that it is the same.
    resumes = bool(request["content"]) and marker.exists() and marker.read_text() == text
    kept = {_shard_name(number) for number in range(_num_shards(request))} if resumes else set()
    for path in [*ours, *folder.glob(f"{WRITING_NAME}.*.tmp")]:
        if path.name not in kept:
            path.unlink()
    with AtomicFile(marker) as file:
        file.write(text.encode())
    if resumes:
        logger.info("%s: going on with a write that was stopped; %d shards are there", folder, len(list(folder.glob("shard-*.tar"))))


def _num_shards(request: dict[str, Any]) -> int:
    return math.ceil(request["total"] / request["samples_per_shard"])


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _finish(folder: Path) -> None:
    """What follows index.json. Done again when a write is stopped in the middle of it, so everything here must bear that."""
    write_interop(folder)
    (folder / WRITING_NAME).unlink(missing_ok=True)


def _plan(
    samples: Samples | Sequence[tuple[Any, ...]], folder: Path, request: dict[str, Any], reencoder: Reencoder | None
) -> Iterator[ShardTask]:
    """One task a shard, made when asked for."""
    source = samples if hasattr(samples, "subset") else ListSamples(samples)
    order = permutation(request["seed"], 0, len(samples))
    size = request["samples_per_shard"]
    for number, start in enumerate(range(0, len(order), size)):
        part = source.subset(order[start : start + size])
        yield ShardTask(number, folder / _shard_name(number), part, request["class_names"], reencoder)


def _write_tasks(tasks: Iterator[ShardTask], total: int, workers: int, what: str) -> list[ShardDone]:
    """All shards, by number."""
    with Progress(total, what) as bar:
        return sorted(write_all(tasks, workers, bar.advance), key=lambda part: part.number)


def _check_keys(folder: Path, done: Sequence[ShardDone]) -> None:
    """Within a shard this was checked when it was written."""
    shard_of: dict[str, int] = {}
    for part in done:
        for row in part.rows:
            if row.key in shard_of:
                raise ShardError(f"{folder}: key {row.key!r} is in shards {shard_of[row.key]} and {part.number}; {KEY_RULE}")
            shard_of[row.key] = part.number


def _in_use(folder: Path) -> ShardError:
    return ShardError(f"{folder}: another process is writing shards into this folder; wait for it, or end it")

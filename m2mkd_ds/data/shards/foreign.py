"""An index for shards that somebody else wrote: `m2mkd shards index`.

Every shard is walked once (`data/shards/scan.py`), in several processes. What a shard gave is kept in FOLDER/index.parts until the
index is whole, so an interrupted run goes on where it stopped. The result is a function of the shards alone: neither the order of
the arguments nor the number of processes changes the fingerprint.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import INDEX_NAME, ShardIndex, table_dtype, write_index
from m2mkd_ds.data.remote.addresses import is_remote
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.shards.interop import INFO_NAMES, ShardsInfo, expected_counts, parse_info, write_interop
from m2mkd_ds.data.shards.scan import BROKEN_OFF, ShardFault
from m2mkd_ds.data.shards.scan_parts import ScanJob, ScannedShard, scan_or_recall
from m2mkd_ds.data.shards.shard_list import OpenShard, ShardList, check_packages, list_shards, open_shard_stream, opened, refuse_secrets
from m2mkd_ds.data.shards.shard_pool import map_shards

logger = logging.getLogger("m2mkd_ds")

BAD_NAME = "bad.jsonl"
PARTS_NAME = "index.parts"
MAX_SHOWN = 20
_MAX_GUESSED_CLASSES = 1_000_000
"""A damaged label may be any number; more classes than this have to be asked for."""


@dataclass(frozen=True, kw_only=True)
class IndexRequest:
    """What an index is made from."""

    shards: tuple[str, ...]
    """Folders, globs, brace patterns, paths, URLs."""
    out: Path | None = None
    """Folder of the index; by default the one that the shards are in."""
    split: str = ""
    """Split of the `_info.json` in the folder of shards."""
    label_field: str = ""
    """Field of KEY.json that holds the label; empty: KEY.cls."""
    class_names: tuple[str, ...] = ()
    """By class number; empty: from `_info.json`, from the `class_name` of the JSON members, or the numbers themselves."""
    num_classes: int = 0
    """0: as many as there are names, or the largest label + 1."""
    allow_bad: int = 0
    """Damaged samples that may be left out."""
    source: str = ""
    license: str = "unknown"


INFO_DEADLINE_S = 10.0
"""How long the optional files beside the shards are waited for."""


def index_shards(
    request: IndexRequest, *, workers: int = 0, access: Access | None = None, open_shard: OpenShard = open_shard_stream
) -> ShardIndex:
    """Index the shards of `request`; an index of the same shards that is there already is kept.

    Raises ShardError for damaged samples beyond `allow_bad` (all are listed), counts other than `_info.json` says, labels
    without class, and a folder that holds an index of other shards.
    """
    access = access or Access()
    check_packages(request.shards)
    shards, info, label_field = _choose(request, access, open_shard)
    out = request.out or Path(shards.base)
    if request.out is None and not shards.is_local:
        raise ShardError(f"the shards lie at {shards.base}; give a folder for their index with --out")
    if (out / INDEX_NAME).exists():
        return _keep(out, shards, request, label_field)
    parts = out / PARTS_NAME
    jobs = [ScanJob(shards.address(name), name, label_field, parts, access, open_shard) for name in shards.names]
    with _kept_folder(parts):
        found = map_shards(scan_or_recall, jobs, workers=workers, what=f"index {out.name}", num_bytes=lambda part: part.bytes_read)
    if limit := len(request.class_names) or request.num_classes or (len(info.class_names) if info is not None else 0):
        found = [_without_high_labels(part, limit) for part in found]
    num_bad = _check_counts(found, info, shards)
    faults = [fault for part in found for fault in part.faults]
    _check_faults(faults, num_bad, request.allow_bad)
    table = _merge([part.table for part in found])
    class_names = _class_names(request, info, found, table)
    _write_bad(out / BAD_NAME, faults)
    write_index(
        out,
        [part.record for part in found],
        table,
        class_names=class_names,
        source=request.source or f"shards:{Path(shards.base).name}",
        license=request.license,
        request={"made_by": "index", "label_field": label_field, "num_bad": num_bad},
        base="" if shards.is_local and out.resolve() == Path(shards.base).resolve() else shards.base,
    )
    shutil.rmtree(parts)
    write_interop(out)
    _report_repeated_keys(table)
    logger.info("%s: %d samples of %d classes in %d shards, %d left out", out, len(table), len(class_names), len(found), num_bad)
    return ShardIndex.load_unchecked(out, access)


@contextlib.contextmanager
def _kept_folder(folder: Path) -> Iterator[None]:
    """Make the folder for what is inside; after an error, those folders that this made and that hold nothing are removed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: finished shards are kept there
                path.rmdir()
        raise


def _choose(request: IndexRequest, access: Access, open_shard: OpenShard) -> tuple[ShardList, ShardsInfo | None, str]:
    """The shards, the `_info.json` beside them, and the field of the label."""
    only = request.shards[0].removeprefix("file://").removeprefix("file:") if len(request.shards) == 1 else ""
    is_folder = (is_remote(only) and only.endswith("/")) or (bool(only) and not is_remote(only) and Path(only).is_dir())
    if not is_folder:
        if request.split:
            raise ShardError(f"split is {request.split!r}, but shards are named one by one; give their folder (a URL with / at its end)")
        shards = list_shards(request.shards)
        return shards, _read_info(shards.base, access, open_shard), request.label_field
    base = only if is_remote(only) else f"{Path(only).resolve()}/"
    if is_remote(only):
        refuse_secrets(only)
    info = _read_info(base, access, open_shard)
    if info is None or not info.splits:
        if request.split or is_remote(only):
            raise ShardError(f"{base}: holds no {INFO_NAMES[0]} with splits; name the shards, for example {base}x-{{0000..1023}}.tar")
        return list_shards(request.shards), info, request.label_field
    names = sorted(info.splits)
    if request.split not in (names if request.split or len(names) > 1 else [""]):
        raise ShardError(f"{info.where} has the splits {', '.join(names)}; give one with --split, and each split its own --out")
    split = info.splits[request.split or names[0]]
    shards = ShardList(base, tuple(sorted(split.num_samples_by_name)))
    missing = [name for name in shards.names if shards.is_local and not Path(shards.address(name)).is_file()]
    if missing:
        raise ShardError(f"{base}: {len(missing)} of the {len(shards.names)} shards in {info.where} are missing, first {missing[0]}")
    return shards, info, request.label_field or split.alt_label


def _read_info(base: str, access: Access, open_shard: OpenShard) -> ShardsInfo | None:
    for name in INFO_NAMES:
        try:
            with opened(base + name, replace(access, deadline_s=min(access.deadline_s, INFO_DEADLINE_S)), open_shard) as stream:
                text = io.BytesIO()
                while part := stream.read(1 << 20):
                    text.write(part)
        except FileNotFoundError:
            continue
        except OSError as err:
            # Object stores answer 403 for what is not there.
            logger.warning("%s cannot be read (%s); counts are not compared with it", name, err)
            continue
        return parse_info(base + name, text.getvalue())
    return None


def _keep(out: Path, shards: ShardList, request: IndexRequest, label_field: str) -> ShardIndex:
    """An index is there: kept when it is of these shards, refused otherwise (nobody's index is overwritten)."""
    index = ShardIndex.load_unchecked(out)
    folder = index.base if is_remote(index.base) else f"{index.shard_folder.resolve()}/"
    wanted = shards.base if is_remote(shards.base) else f"{Path(shards.base).resolve()}/"
    pairs: list[tuple[str, object, object]] = [
        ("address", folder, wanted),
        ("shards", [shard.name for shard in index.shards], list(shards.names)),
        ("label_field", index.request.get("label_field", ""), label_field),
        ("num_classes", index.num_classes, request.num_classes or index.num_classes),
        ("class_names", index.class_names, request.class_names or index.class_names),
    ]
    if shards.is_local:
        sizes = [path.stat().st_size if (path := index.shard_folder / shard.name).is_file() else -1 for shard in index.shards]
        pairs.append(("sizes of shards", [shard.bytes for shard in index.shards], sizes))
    differing = [name for name, there, asked in pairs if there != asked]
    if index.request.get("num_bad", 0) > request.allow_bad:
        differing.append(f"allow_bad ({index.request['num_bad']} were left out)")
    if differing:
        raise ShardError(f"{out} holds another index, it differs in {', '.join(differing)}; remove its {INDEX_NAME} or give another --out")
    logger.info("%s: up to date by names and sizes (`m2mkd shards verify` reads everything again)", out)
    return index


def _without_high_labels(part: ScannedShard, num_classes: int) -> ScannedShard:
    """Samples whose label has no class become faults."""
    high = part.table["label"] >= num_classes
    if not high.any():
        return part
    name = part.record.name
    faults = [
        ShardFault("bad_label", name, key, f"sample {key}: its label is {row['label']}, there are {num_classes} classes, numbered from 0")
        for row in part.table[high]
        for key in [row["key"].decode()]
    ]
    record = replace(part.record, num_samples=int((~high).sum()))
    return replace(part, record=record, table=part.table[~high], faults=(*part.faults, *faults))


def _check_counts(found: Sequence[ScannedShard], info: ShardsInfo | None, shards: ShardList) -> int:
    """Compare with `_info.json`. Returns the number of damaged samples: of a broken-off shard, all that are missing."""
    expected = expected_counts(info, shards.names)
    num_bad = 0
    for part in found:
        broken = sum(fault.kind in BROKEN_OFF for fault in part.faults)
        single = len(part.faults) - broken
        seen = part.record.num_samples + single
        missing = expected.get(part.record.name, seen + broken) - seen
        if missing and not (broken and missing > 0) and info is not None:
            raise ShardError(
                f"{part.record.name}: {info.where} says {expected[part.record.name]} samples, the shard has {seen}; "
                "get the shard again, or correct or remove the list"
            )
        num_bad += single + max(missing, broken)
    return num_bad


def _check_faults(faults: Sequence[ShardFault], num_bad: int, allow_bad: int) -> None:
    if num_bad <= allow_bad:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(fault.kind for fault in faults).items()))
    lines = [str(fault) for fault in faults[:MAX_SHOWN]]
    if len(faults) > MAX_SHOWN:
        lines.append(f"... and {len(faults) - MAX_SHOWN} more")
    raise ShardError(
        f"{num_bad} damaged samples ({kinds}), allowed are {allow_bad}; get the shards again, or leave the samples out with "
        f"--allow-bad {num_bad}:\n" + "\n".join(lines)
    )


def _merge(tables: Sequence[np.ndarray]) -> np.ndarray:
    """One table of all shards, with their numbers."""
    width = max((table.dtype["key"].itemsize for table in tables), default=1)
    merged = np.zeros(sum(map(len, tables)), dtype=table_dtype(width))
    start = 0
    for number, table in enumerate(tables):
        rows = merged[start : start + len(table)]
        for column in table.dtype.names or ():
            rows[column] = table[column]
        rows["shard"] = number
        start += len(table)
    return merged


def _class_names(request: IndexRequest, info: ShardsInfo | None, found: Sequence[ScannedShard], table: np.ndarray) -> tuple[str, ...]:
    """Names by class number: as given, as `_info.json` or the JSON members say, or the number where nobody says anything."""
    largest = int(table["label"].max()) if len(table) else -1
    names = request.class_names or (info.class_names if info is not None else ())
    count = request.num_classes or len(names) or largest + 1
    if names and len(names) != count:
        raise ShardError(f"num_classes is {count}, but there are {len(names)} class names; make them equal")
    if not names and not request.num_classes and count > _MAX_GUESSED_CLASSES:
        raise ShardError(
            f"the largest label is {largest}; if there are so many classes, give --num-classes, else it finds the damaged ones"
        )
    if names:
        return tuple(names)
    said: dict[int, str] = {}
    for part in found:
        for label, words in part.class_names.items():
            if len({*words, said.get(label, words[0])}) > 1:
                both = sorted({*words, said.get(label, words[0])})[:2]
                raise ShardError(f"{part.record.name}: label {label} is named {both[0]!r} and {both[1]!r}; give names with --class-names")
            said[label] = words[0]
    return tuple(said.get(label, str(label)) for label in range(count))


def _write_bad(path: Path, faults: Sequence[ShardFault]) -> None:
    """The samples that are left out, one JSON object a line; no file when there are none."""
    if not faults:
        path.unlink(missing_ok=True)
        return
    with AtomicFile(path) as file:
        for fault in faults:
            file.write(fault_line(fault).encode())


def fault_line(fault: ShardFault) -> str:
    """One line of JSON: kind, shard, key, message, and the sample's number where it has one."""
    tree: dict[str, Any] = {name: value for name, value in asdict(fault).items() if value is not None}
    return json.dumps(tree, ensure_ascii=False) + "\n"


def _report_repeated_keys(table: np.ndarray) -> None:
    repeated = len(table) - len(np.unique(table["key"]))
    if repeated:
        logger.warning("%d keys occur in more than one shard; samples are told apart by their number, messages name the shard", repeated)

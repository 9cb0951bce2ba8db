"""What walking one shard gave, kept on disk until the index of all shards is whole.

FOLDER/index.parts/<hash of address, size, time, label field>.npz   rows, record, faults and class names of one shard
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardRecord
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.shards.scan import ShardFault, make_table, scan_samples
from m2mkd_ds.data.shards.shard_list import OpenShard, opened

_PART_FORMAT = 1


@dataclass(frozen=True)
class ScanJob:
    """One shard to walk."""

    address: str
    name: str
    label_field: str
    parts: Path
    access: Access
    open_shard: OpenShard


@dataclass(frozen=True)
class ScannedShard:
    """What one shard gave; `table` has shard number 0 in all its rows."""

    record: ShardRecord
    table: np.ndarray
    faults: tuple[ShardFault, ...]
    class_names: Mapping[int, tuple[str, ...]]
    bytes_read: int


def scan_or_recall(job: ScanJob) -> ScannedShard:
    """Walk one shard, or take what an earlier run kept of it. Raises ShardError when it cannot be read."""
    try:
        with opened(job.address, job.access, job.open_shard) as stream:
            words = json.dumps([_PART_FORMAT, job.address, stream.stamp, job.label_field])
            kept = job.parts / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.npz"
            if stream.stamp and kept.exists():
                return _read_part(kept)
            scan = scan_samples(stream, job.name, label_field=job.label_field)
            if stream.num_bytes and scan.record.bytes != stream.num_bytes:
                raise OSError(f"{scan.record.bytes} of {stream.num_bytes} bytes came")
    except OSError as err:
        message = f"{job.name}: cannot be read ({err}); see to it and run the same command again, finished shards are kept"
        raise ShardError(message) from err
    rows = [row for row in scan.rows if row.size]
    empty = [ShardFault("no_image", job.name, row.key, f"sample {row.key}: its image has 0 bytes") for row in scan.rows if not row.size]
    record = ShardRecord(job.name, scan.record.bytes, scan.record.sha256, len(rows))
    table = make_table([(0, *row) for row in rows])
    part = ScannedShard(record, table, (*scan.faults, *empty), scan.class_names, scan.record.bytes)
    if stream.stamp:
        _write_part(kept, part)
    return part


def _write_part(path: Path, part: ScannedShard) -> None:
    faults = [asdict(fault) for fault in part.faults]
    words = {"record": asdict(part.record), "faults": faults, "class_names": list(part.class_names.items())}
    with AtomicFile(path) as file:
        np.savez(file, table=part.table, words=np.frombuffer(json.dumps(words).encode(), dtype=np.uint8))


def _read_part(path: Path) -> ScannedShard:
    with np.load(path, allow_pickle=False) as arrays:
        table, words = arrays["table"], json.loads(arrays["words"].tobytes())
    faults = tuple(ShardFault(**fault) for fault in words["faults"])
    return ScannedShard(ShardRecord(**words["record"]), table, faults, {label: tuple(names) for label, names in words["class_names"]}, 0)

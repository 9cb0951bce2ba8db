"""Reading everything again: `m2mkd shards verify`.

Each shard is walked once: SHA-256 of the file, CRC-32 and label of every sample against the index, and every image decoded in
full. Where a damaged header ends the walk, the remaining samples are read at their indexed offsets, as training would.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from m2mkd_ds.data.decode import UNDECODABLE
from m2mkd_ds.data.index import ShardIndex, ShardRecord
from m2mkd_ds.data.remote.addresses import join
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.shards.scan import BROKEN_OFF, ShardFault, ShardRow, ShardScan, scan_samples
from m2mkd_ds.data.shards.shard_list import OpenShard, open_shard_stream, opened
from m2mkd_ds.data.shards.shard_pool import map_shards
from m2mkd_ds.data.shards.tar_stream import ForwardFile, SummedReader


@dataclass(frozen=True)
class ShardReport:
    """What is wrong with one shard."""

    shard: str
    num_samples: int
    """As indexed."""
    num_bytes: int
    """Read."""
    faults: tuple[ShardFault, ...]


@dataclass(frozen=True)
class _Job:
    address: str
    record: ShardRecord
    first_sample: int
    table: np.ndarray
    label_field: str
    decode: bool
    access: Access
    open_shard: OpenShard


def verify_shards(
    folder: str | Path,
    *,
    workers: int = 0,
    decode: bool = True,
    access: Access | None = None,
    open_shard: OpenShard = open_shard_stream,
) -> list[ShardReport]:
    """Check all shards of an index, in several processes; a report a shard, in index order.

    Faults are in the reports. Raises ShardError when the index itself cannot be read.
    """
    access = access or Access()
    index = ShardIndex.load_unchecked(folder, access)
    ends = np.cumsum([0, *index.shard_sizes])
    jobs = [
        _Job(
            join(index.base, shard.name), shard, int(ends[number]), index.table[ends[number] : ends[number + 1]],
            index.request.get("label_field", ""), decode, access, open_shard,
        )
        for number, shard in enumerate(index.shards)
    ]  # fmt: skip
    return map_shards(verify_shard, jobs, workers=workers, what=f"verify {index.folder.name}", num_bytes=lambda report: report.num_bytes)


def image_fault(data: bytes) -> str:
    """Why an image cannot be decoded, or nothing."""
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except UNDECODABLE as err:
        return f"cannot decode the image ({type(err).__name__}: {str(err).split(' <_io')[0]})"
    return ""


def verify_shard(job: _Job) -> ShardReport:
    """Walk one shard and compare it with its rows of the index."""
    problems: dict[int, str] = {}

    def look(row: ShardRow, image: bytes) -> None:
        if problem := image_fault(image):
            problems[row.offset] = problem

    name = job.record.name
    try:
        with opened(job.address, job.access, job.open_shard) as stream:
            scan = scan_samples(stream, name, label_field=job.label_field, visit=look if job.decode else None)
        faults = list(_compare(job, scan, problems))
        if any(fault.kind in BROKEN_OFF for fault in scan.faults):
            faults += _read_by_offset(job, {row.offset for row in scan.rows})
    except OSError as err:
        reason = "it is not there" if isinstance(err, FileNotFoundError) else f"cannot be read ({err})"
        return ShardReport(name, job.record.num_samples, 0, (ShardFault("io", name, "", f"{reason}; copy it again"),))
    return ShardReport(name, job.record.num_samples, scan.record.bytes, tuple(faults))


def _compare(job: _Job, scan: ShardScan, problems: Mapping[int, str]) -> Iterator[ShardFault]:
    """Faults of the shard as a whole, then of its samples."""
    name, record = job.record.name, job.record
    changed = (scan.record.sha256, scan.record.bytes) != (record.sha256, record.bytes)
    if changed:
        sizes = f"{scan.record.bytes} bytes" + (f", not {record.bytes}" if scan.record.bytes != record.bytes else "")
        message = f"other bytes than were indexed: sha256 {scan.record.sha256[:16]}, not {record.sha256[:16]}; {sizes}"
        yield ShardFault("checksum", name, "", message)
        yield from (fault for fault in scan.faults if fault.kind in BROKEN_OFF)
    broken = any(fault.kind in BROKEN_OFF for fault in scan.faults)
    found = {row.offset: row for row in scan.rows}
    by_key = {fault.key: fault for fault in scan.faults if fault.key}
    for place, row in enumerate(job.table):
        _, offset, _, label, crc32, raw_key, _ = row.item()
        sample, key = job.first_sample + place, raw_key.decode()
        got = found.pop(offset, None)
        if got is None:
            if key in by_key and by_key[key].kind not in BROKEN_OFF:
                yield replace(by_key[key], sample=sample)
            elif not broken:
                yield ShardFault("checksum", name, key, f"sample {key}: nothing begins at its indexed place", sample)
            continue
        where = f"sample {key} (number {sample})"
        if got.crc32 != crc32:
            also = f"; {problems[offset]}" if offset in problems else ""
            yield ShardFault("checksum", name, key, f"{where}: its image has other bytes than were indexed (crc32 differs){also}", sample)
        elif offset in problems:
            yield ShardFault("undecodable", name, key, f"{where}: {problems[offset]}", sample)
        if got.label != label:
            yield ShardFault("bad_label", name, key, f"{where}: the shard says label {got.label}, the index {label}", sample)
        if got.key != key:
            yield ShardFault("checksum", name, key, f"{where}: the shard calls it {got.key}", sample)
    if changed and found:
        yield ShardFault("checksum", name, "", f"{len(found)} samples are not in the index; index the shards again")


def _read_by_offset(job: _Job, walked: set[int]) -> Iterator[ShardFault]:
    """The indexed samples that the walk did not come to; those that are still whole need no fault of their own."""
    with opened(job.address, job.access, job.open_shard) as stream:
        for place, data in _images_at(stream, job.table):
            _, offset, size, _, crc32, raw_key, _ = job.table[place].item()
            if offset in walked:
                continue
            sample, key = job.first_sample + place, raw_key.decode()
            where = f"sample {key} (number {sample})"
            if len(data) != size:
                yield ShardFault("truncated", job.record.name, key, f"{where}: {len(data)} of {size} bytes are there", sample)
            elif zlib.crc32(data) != crc32:
                message = f"{where}: its image has other bytes than were indexed (crc32 differs)"
                yield ShardFault("checksum", job.record.name, key, message, sample)
            elif job.decode and (problem := image_fault(data)):
                yield ShardFault("undecodable", job.record.name, key, f"{where}: {problem}", sample)


def _images_at(file: ForwardFile, table: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """(row, bytes) at the offsets of a shard's rows, by reading forward."""
    reader = SummedReader(file)
    for place in np.argsort(table["offset"], kind="stable").tolist():
        offset, size = int(table[place]["offset"]), int(table[place]["size"])
        for _ in reader.chunks(max(0, offset - reader.position)):
            pass
        yield place, reader.read(size) if reader.position == offset else b""

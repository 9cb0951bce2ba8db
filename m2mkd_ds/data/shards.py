"""Reading a webdataset tar once, to learn where its samples lie."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardRecord

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class ShardRow(NamedTuple):
    """Where one sample lies in its shard."""

    offset: int
    size: int
    label: int
    crc32: int
    key: str
    extension: str


def scan_shard(path: Path) -> tuple[ShardRecord, list[ShardRow]]:
    """Read a shard once: size, sha256, and offset, size, label, crc32, key, extension of every sample.

    Members of a sample must follow one another (webdataset's rule). Raises ShardError for a truncated tar, a sample
    without image or label, and a key that comes twice.
    """
    rows: list[ShardRow] = []
    try:
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    except tarfile.TarError as err:
        raise ShardError(f"{path}: not a complete tar file ({err}); copy or write it again") from err
    fields: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    for position, (name, offset, size) in enumerate(members):
        key, extension = _split_name(name)
        fields[extension] = (offset, size)
        is_last = position + 1 == len(members) or _split_name(members[position + 1][0])[0] != key
        if not is_last:
            continue
        if key in seen:
            raise ShardError(f"{path}: key {key} comes twice; every sample needs its own key")
        seen.add(key)
        rows.append(_row(path, data, key, fields))
        fields = {}
    record = ShardRecord(path.name, len(data), hashlib.sha256(data).hexdigest(), len(rows))
    return record, rows


def _row(path: Path, data: bytes, key: str, fields: dict[str, tuple[int, int]]) -> ShardRow:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in fields]
    if len(images) != 1 or "cls" not in fields:
        raise ShardError(f"{path}: sample {key} has members {sorted(fields)}; needed are cls and one of {', '.join(IMAGE_EXTENSIONS)}")
    offset, size = fields[images[0]]
    label_offset, label_size = fields["cls"]
    text = data[label_offset : label_offset + label_size]
    if offset + size > len(data) or not text.strip().isdigit():
        raise ShardError(f"{path}: sample {key} is cut off or its label {text[:20]!r} is not a number; copy or write the shard again")
    return ShardRow(offset, size, int(text), zlib.crc32(memoryview(data)[offset : offset + size]), key, images[0])


def _split_name(name: str) -> tuple[str, str]:
    """`a/b.png` -> (`a/b`, `png`): the field begins after the first dot of the last path part."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()

"""Reading a shard once, front to back, to learn where its samples lie and what is wrong with it.

    KEY.jpg | jpeg | png | webp   the image; exactly one
    KEY.cls                       the label in digits; or a field of KEY.json, when one is named
    KEY.json                      optional; its `class_name` names the class
    KEY.anything                  ignored

This is webdataset's layout: the members of a sample follow one another, and the field begins after the first dot of the
file name. Ours, `timm/imagenet-1k-wds` and what webdataset's ShardWriter makes all follow it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardRecord, table_dtype
from m2mkd_ds.data.shards.tar_stream import ForwardFile, Member, SummedReader, TarWalkError, walk_tar

READABLE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL = 2**31 - 1

FaultKind = Literal[
    "truncated", "damaged_tar", "not_tar", "unsupported", "no_image", "bad_label", "duplicate_key", "bad_member",
    "undecodable", "checksum", "io",
]  # fmt: skip
"""The first four concern the shard from some byte on, the others one sample. `undecodable`, `checksum` and `io` come from `verify`."""
BROKEN_OFF = ("truncated", "damaged_tar", "not_tar", "unsupported")
"""Kinds after which the rest of a shard is unknown."""


class ShardRow(NamedTuple):
    """Where one sample lies in its shard."""

    offset: int
    size: int
    label: int
    crc32: int
    key: str
    extension: str


@dataclass(frozen=True)
class ShardFault:
    """One thing that is wrong with a shard."""

    kind: FaultKind
    shard: str
    key: str
    """Of the sample; empty when it is the shard as a whole."""
    message: str
    sample: int | None = None
    """Number in the index, where there is one."""

    def __str__(self) -> str:
        return f"{self.shard}: {self.message}"


@dataclass(frozen=True)
class ShardScan:
    """What a walk over one shard found."""

    record: ShardRecord
    rows: list[ShardRow]
    faults: list[ShardFault]
    class_names: dict[int, tuple[str, ...]]
    """Names by label, as the JSON members say; two when they contradict one another."""


@dataclass
class _Sample:
    """The members of one key, as far as they have been seen."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    fault: tuple[FaultKind, str] | None = None


def scan_shard(path: Path) -> tuple[ShardRecord, list[ShardRow]]:
    """Read a local shard once: size, sha256, and offset, size, label, crc32, key, extension of every sample.

    Raises ShardError for the first fault: a truncated or damaged tar, a sample without image or label, a key that comes twice.
    """
    with path.open("rb", buffering=0) as file:
        record, rows, faults = scan_stream(file, path.name)
    if faults:
        raise ShardError(f"{path}: {faults[0].message}")
    return record, rows


def scan_stream(file: ForwardFile, name: str) -> tuple[ShardRecord, list[ShardRow], list[ShardFault]]:
    """Like `scan_shard` for any forward stream; faults are returned, and the rows are those of the sound samples."""
    scan = scan_samples(file, name)
    return scan.record, scan.rows, scan.faults


def scan_samples(
    file: ForwardFile, name: str, *, label_field: str = "", visit: Callable[[ShardRow, bytes], None] | None = None
) -> ShardScan:
    """Walk the shard `name` to its end, whatever is wrong with it.

    `label_field`: the field of KEY.json that holds the label; empty: the label is KEY.cls. `visit`: is called with every sound
    sample and its image file. Raises OSError when `file` cannot be read.
    """
    reader = SummedReader(file)
    found = _Found(name, label_field, visit)

    def wanted(member: str) -> bool:
        extension = split_name(member)[1]
        return extension in ("cls", "json") or (visit is not None and extension in READABLE_EXTENSIONS)

    try:
        for member in walk_tar(reader, wanted):
            found.add(member)
        found.finish()
    except TarWalkError as err:
        found.break_off(err)
        reader.drain()
    record = ShardRecord(name, reader.position, reader.sha256, len(found.rows))
    return ShardScan(record, found.rows, found.faults, found.class_names)


_SHARD_FAULTS = {
    "truncated": "not a complete tar file",
    "damaged_tar": "a damaged tar file",
    "not_tar": "not a tar file",
    "unsupported": "a tar file that cannot be indexed",
}


class _Found:
    """Groups members into samples and keeps what is sound of them."""

    def __init__(self, shard: str, label_field: str, visit: Callable[[ShardRow, bytes], None] | None) -> None:
        self.rows: list[ShardRow] = []
        self.faults: list[ShardFault] = []
        self.class_names: dict[int, tuple[str, ...]] = {}
        self._shard, self._label_field, self._visit = shard, label_field, visit
        self._label_member = "json" if label_field else "cls"
        self._open: _Sample | None = None
        self._seen: set[str] = set()

    def add(self, member: Member) -> None:
        """The next member of the tar."""
        key, extension = split_name(member.name)
        if not key:
            return
        if self._open is None or self._open.key != key:
            self.finish()
            self._open = _Sample(key)
        sample = self._open
        if member.refused:
            sample.fault = "bad_member", f"sample {_shown(key)}: {extension} is {member.refused}; pack plain files"
        elif extension in sample.members:
            sample.fault = "duplicate_key", f"key {key} comes twice: two members {extension}; every sample needs its own key"
        else:
            sample.members[extension] = member

    def finish(self) -> None:
        """The open sample is complete."""
        sample, self._open = self._open, None
        if sample is None:
            return
        if sample.key in self._seen:
            message = f"key {sample.key} comes twice; every sample needs its own key, and its members must follow one another"
            sample.fault = "duplicate_key", message
        self._seen.add(sample.key)
        if sample.fault is None:
            sample.fault = self._take(sample)
        if sample.fault is not None:
            kind, message = sample.fault
            self.faults.append(ShardFault(kind, self._shard, _shown(sample.key), message))

    def break_off(self, err: TarWalkError) -> None:
        """The walk cannot go on: the open sample counts if it is whole, and the fault is the shard's if it is not."""
        sample, key = self._open, ""
        if sample is not None and sample.fault is None and not self._is_whole(sample):
            key = _shown(sample.key)  # a fault of its own would only repeat this one
            self._open = None
        self.finish()
        cut = split_name(err.member)[0]
        if not key and cut not in self._seen:
            key = _shown(cut)
        after = self.rows[-1].key if self.rows else ""
        where = f"from sample {key} on" if key else f"behind sample {after}" if after else "all"
        message = f"{_SHARD_FAULTS[err.kind]} ({err}); samples are lost: {where}; copy or write it again"
        self.faults.append(ShardFault(err.kind, self._shard, key, message))

    def _is_whole(self, sample: _Sample) -> bool:
        return _image(sample) is not None and self._label_member in sample.members

    def _take(self, sample: _Sample) -> tuple[FaultKind, str] | None:
        """Make a row of a complete sample, or say what is wrong with it."""
        image = _image(sample)
        if image is None or self._label_member not in sample.members:
            allowed = ", ".join(READABLE_EXTENSIONS)
            kind: FaultKind = "no_image" if image is None else "bad_label"
            return kind, f"sample {sample.key} has members {sorted(sample.members)}; needed are {self._label_member} and one of {allowed}"
        info = _json(sample)
        if self._label_field:
            label = info.get(self._label_field)
            text = f"field {self._label_field!r} {label!r}"
        else:
            raw = sample.members["cls"].data or b""
            label, text = _digits(raw), repr(raw[:20])
        if type(label) is not int or not 0 <= label <= MAX_LABEL:
            return "bad_label", f"sample {sample.key}: its label {text} is not a number from 0 to {MAX_LABEL}; write the shard again"
        if isinstance(name := info.get("class_name"), str) and name not in (names := self.class_names.get(label, ())):
            self.class_names[label] = (*names[:1], name)
        self.rows.append(ShardRow(image.offset, image.size, label, image.crc32, sample.key, split_name(image.name)[1]))
        if self._visit is not None:
            self._visit(self.rows[-1], image.data or b"")
        return None


def _image(sample: _Sample) -> Member | None:
    """The image of a sample; none when there is none, or several that one would have to choose from."""
    images = [sample.members[extension] for extension in READABLE_EXTENSIONS if extension in sample.members]
    return images[0] if len(images) == 1 else None


def _digits(raw: bytes) -> int | None:
    text = raw.strip()
    return int(text) if text.isdigit() and len(text) < 20 else None


def _json(sample: _Sample) -> dict[str, Any]:
    """The object in KEY.json; empty when there is none (then a label that should be in it is missing, and that is a fault)."""
    if "json" not in sample.members:
        return {}
    try:
        tree = json.loads(sample.members["json"].data or b"")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


_META = re.compile(r"__[^/]*__($|/)")


def split_name(name: str) -> tuple[str, str]:
    """`a/b.PNG` -> (`a/b`, `png`): the field begins after the first dot of the last path part.

    Names without one, hidden files and webdataset's `__meta__` members belong to no sample: ("", "").
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _META.match(name):
        return "", ""
    return folder + slash + stem, extension.lower()


def _shown(key: str) -> str:
    """A key that can be printed, also when its bytes are not UTF-8."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def make_table(rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    """Rows (shard number, *ShardRow) as the structured array of index.npy; keys are stored as UTF-8."""
    encoded = [(*row[:5], row[5].encode(), row[6].encode()) for row in rows]
    return np.array(encoded, dtype=table_dtype(max((len(row[5]) for row in encoded), default=1)))

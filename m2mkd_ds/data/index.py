"""The index of a folder of webdataset shards: where every sample lies, so that any sample can be read by number.

    FOLDER/shard-000000.tar ...   plain webdataset shards (KEY.png|jpg, KEY.cls, KEY.json)
    FOLDER/index.npy              one row a sample: shard, offset, size, label, crc32, key, extension (memory-mapped)
    FOLDER/index.json             shards with size and sha256, classes, source, licence, fingerprint; written last

The shards may lie elsewhere: then `base` in index.json is the address that their names are appended to.

A sample is one `pread` at a known offset: no tar parsing, no shared file position, so any process or thread may read
any sample in any order. The order itself is the business of `data/order.py`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_ds.data.atomic import AtomicFile, file_sha256
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.addresses import is_remote, join, local_path, redact, resolve_base
from m2mkd_ds.data.remote.files import CachedFiles, RangeFiles, check_base, open_files
from m2mkd_ds.data.remote.index_copy import local_copy
from m2mkd_ds.data.shard_files import Access, ShardFiles

FORMAT = "m2mkd-shards-1"
INDEX_NAME = "index.json"
TABLE_NAME = "index.npy"


@dataclass(frozen=True)
class ShardRecord:
    """One tar file of the folder."""

    name: str
    bytes: int
    sha256: str
    num_samples: int


def table_dtype(key_width: int) -> np.dtype[Any]:
    """Row type of index.npy; `key_width` is the longest key in bytes (UTF-8; our own keys are ASCII)."""
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<i8"),
            ("size", "<i8"),
            ("label", "<i4"),
            ("crc32", "<u4"),
            ("key", f"S{key_width}"),
            ("extension", "S4"),
        ]
    )


def write_index(
    folder: Path,
    shards: Sequence[ShardRecord],
    table: np.ndarray,
    *,
    class_names: Sequence[str],
    source: str,
    license: str,
    request: Mapping[str, Any],
    base: str = "",
) -> None:
    """Write index.npy, then index.json, each under a temporary name first: a folder without index.json is incomplete.

    `base`: folder or URL of the shards; empty when they lie in `folder`. Not part of the fingerprint: a copy elsewhere is the same data.
    """
    check_base(base)
    table_path = folder / TABLE_NAME
    with AtomicFile(table_path) as file:
        np.save(file, table, allow_pickle=False)
    content = _content(class_names, shards, file_sha256(table_path))
    tree = {
        **content,
        "fingerprint": _fingerprint(content),
        "num_samples": len(table),
        "source": source,
        "license": license,
        "request": dict(request),
        "base": base,
    }
    with AtomicFile(folder / INDEX_NAME) as file:
        file.write(json.dumps(tree, indent=1).encode())


class ShardIndex:
    """A loaded index. Made by `ShardIndex.load`; cheap to send to a worker (only the path travels)."""

    def __init__(self, folder: Path, tree: Mapping[str, Any], table: np.ndarray, access: Access, address: str = "") -> None:
        self.folder = folder
        """Of the index; for one from elsewhere, its copy on this machine."""
        self.address = address or str(folder)
        """What `load` was given. May hold credentials: show `redact(address)`."""
        self.access = access
        self.base: str = resolve_base(self.address, tree.get("base", ""))
        """Address that shard names are appended to; may hold credentials, too."""
        self.shards = tuple(ShardRecord(**record) for record in tree["shards"])
        self.class_names: tuple[str, ...] = tuple(tree["class_names"])
        self.num_classes = len(self.class_names)
        self.num_samples = len(table)
        self.fingerprint: str = tree["fingerprint"]
        self.source: str = tree["source"]
        self.license: str = tree["license"]
        self.request: dict[str, Any] = tree["request"]
        self.labels_N: np.ndarray = table["label"].astype(np.int64)
        """int64 class number of every sample, in index order."""
        self.table = table
        """One row a sample (`table_dtype`), sorted by shard and offset."""
        named = self.address if is_remote(self.address) else self.base
        self.files: ShardFiles = open_files(self.shards, self.base, self.fingerprint, access, named=named)

    @classmethod
    def load(cls, folder: str | Path, access: Access | None = None) -> ShardIndex:
        """Read and check the index of a folder, or of a URL, and the shard files' sizes (of remote shards: of the first).

        Raises ShardError when the folder is incomplete, a shard is missing or truncated, or the parts disagree; SampleError (io)
        when an address does not answer in time.
        """
        return _load(str(folder), access or Access())

    @classmethod
    def load_unchecked(cls, folder: str | Path, access: Access | None = None) -> ShardIndex:
        """Read and check the index alone, without a look at the shards. Raises ShardError when its parts disagree."""
        return _read_index(str(folder), access or Access())

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (self.address, self.access, self.fingerprint, str(self.folder))

    @property
    def shard_folder(self) -> Path:
        """Where local shards are. Raises ShardError for shards that lie elsewhere."""
        if is_remote(self.base):
            raise ShardError(f"{self.folder}: its shards lie at {redact(self.base)}, not in a folder of this machine")
        return local_path(self.base)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard, in index order; what the plan needs to know of the data."""
        return tuple(shard.num_samples for shard in self.shards)

    def __len__(self) -> int:
        return self.num_samples

    def read(self, sample: int) -> tuple[bytes, int, str]:
        """Image bytes, label and key of sample number `sample`; safe from threads and processes.

        Raises SampleError when the bytes on disk are not the ones that were indexed, IndexError when out of range.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample}: the index of {self.folder} has samples 0 to {self.num_samples - 1}")
        shard, offset, size, label, crc32, key, _ = self.table[sample].item()
        data = self.files.read(shard, offset, size)
        if isinstance(self.files, CachedFiles) and (len(data) != size or zlib.crc32(data) != crc32):
            # The whole shard was right when it arrived, so it is the copy on this disk that is damaged.
            self.files.renew(shard)
            data = self.files.read(shard, offset, size)
        if len(data) != size or zlib.crc32(data) != crc32:
            found = f"only {len(data)} of {size} bytes" if len(data) != size else "other bytes than were indexed (crc32 differs)"
            raise SampleError(
                f"{self.describe(sample)}: the shard holds {found}; write the shards again or restore the file",
                "truncated" if len(data) != size else "checksum",
            )
        return data, label, key.decode()

    def describe(self, sample: int) -> str:
        """Where sample number `sample` is, for messages."""
        row = self.table[sample]
        return f"shard {redact(join(self.base, self.shards[int(row['shard'])].name))}, key {row['key'].decode()}, sample {sample}"


def _load(address: str, access: Access, fingerprint: str = "", folder: str = "") -> ShardIndex:
    """With `fingerprint`, from the copy of a remote index that the process before made in `folder`, without asking again."""
    index = _read_index(address, access, fingerprint, folder)
    if not is_remote(index.base):
        _check_shard_files(index)
    elif not fingerprint and isinstance(index.files, (CachedFiles, RangeFiles)):
        index.files.check_first()
    return index


def _read_index(address: str, access: Access, fingerprint: str = "", folder: str = "") -> ShardIndex:
    if is_remote(address) and folder and (Path(folder) / INDEX_NAME).is_file():
        path = Path(folder)
    elif is_remote(address):
        path = local_copy(address, access, json_name=INDEX_NAME, table_name=TABLE_NAME, fingerprint=fingerprint)
    else:
        path = local_path(address)
    tree = _read_json(path)
    index = ShardIndex(path, tree, _read_table(path, tree), access, address)
    _check_counts(index, tree)
    return index


def _reload(address: str, access: Access, fingerprint: str, folder: str) -> ShardIndex:
    """Load in another process, which may have another environment, and make sure that it is still the same data."""
    index = _load(address, access, fingerprint, folder)
    if index.fingerprint != fingerprint:
        raise ShardError(
            f"{redact(address)}: fingerprint is {index.fingerprint}, the run began with {fingerprint}; the shards were rewritten"
        )
    return index


def _content(class_names: Sequence[str], shards: Sequence[ShardRecord], table_sha256: str) -> dict[str, Any]:
    """What the fingerprint covers: classes, shards with their hashes, and the sample table."""
    return {
        "format": FORMAT,
        "class_names": list(class_names),
        "shards": [asdict(shard) for shard in shards],
        "table_sha256": table_sha256,
    }


def _fingerprint(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_KEYS = ("format", "class_names", "shards", "table_sha256", "fingerprint", "num_samples", "source", "license", "request")


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        parts = sorted(part.parent.name for part in folder.glob(f"*/{INDEX_NAME}"))
        if parts:
            raise ShardError(f"{path}: no such file; but {' and '.join(parts)} in this folder have one, name one of them")
        what = "index them with `m2mkd shards index`" if any(folder.glob("*.tar")) else "write them with `m2mkd shards write`"
        raise ShardError(f"{path}: no such file; the folder holds no complete shards, {what}")
    try:
        tree = json.loads(path.read_text())
    except ValueError as err:
        raise ShardError(f"{path}: not JSON ({err}); write the shards again") from None
    missing = [key for key in _KEYS if not isinstance(tree, dict) or key not in tree]
    if missing or tree["format"] != FORMAT:
        what = f"lacks {', '.join(missing)}" if missing else f"has format {tree['format']!r}"
        raise ShardError(f"{path}: {what}; expected an index of format {FORMAT!r}, write the shards again")
    if tree["fingerprint"] != _fingerprint({key: tree[key] for key in _KEYS[:4]}):
        raise ShardError(f"{path}: its content does not match its fingerprint; it was edited or damaged, write the shards again")
    return tree


def _read_table(folder: Path, tree: Mapping[str, Any]) -> np.ndarray:
    path = folder / TABLE_NAME
    if not path.is_file():
        raise ShardError(f"{path}: no such file, but {INDEX_NAME} is there; write the shards again")
    if file_sha256(path) != tree["table_sha256"]:
        raise ShardError(f"{path}: its sha256 is not the one in {INDEX_NAME}; it is damaged or of other shards, write the shards again")
    # The plain view drops numpy's slow memmap subclass; the pages stay mapped and shared between processes.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _check_counts(index: ShardIndex, tree: Mapping[str, Any]) -> None:
    in_shards = sum(shard.num_samples for shard in index.shards)
    if not index.num_samples == tree["num_samples"] == in_shards:
        raise ShardError(
            f"{index.folder}: {TABLE_NAME} has {index.num_samples} samples, {INDEX_NAME} says {tree['num_samples']} and its shards "
            f"sum to {in_shards}; write the shards again"
        )
    labels_N = index.labels_N
    if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < index.num_classes:
        raise ShardError(
            f"{index.folder}: labels run from {labels_N.min()} to {labels_N.max()}, but there are {index.num_classes} class names"
        )


def _check_shard_files(index: ShardIndex) -> None:
    for shard in index.shards:
        path = local_path(join(index.base, shard.name))
        if not path.is_file():
            raise ShardError(f"{path}: shard is missing ({len(index.shards)} are indexed); copy it here or write the shards again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ShardError(f"{path}: has {size} bytes, the index says {shard.bytes}; it is truncated or changed, copy it again")

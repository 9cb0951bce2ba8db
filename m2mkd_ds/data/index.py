"""The index of a folder of webdataset shards: where every sample lies, so that any sample can be read by number.

    FOLDER/shard-000000.tar ...   plain webdataset shards (KEY.png|jpg, KEY.cls, KEY.json)
    FOLDER/index.npy              one row a sample: shard, offset, size, label, crc32, key, extension (memory-mapped)
    FOLDER/index.json             shards with size and sha256, classes, source, licence, fingerprint; written last

A sample is one `pread` at a known offset: no tar parsing, no shared file position, so any process or thread may read
any sample in any order. The order itself is the business of `data/plan.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = "m2mkd-shards-1"
INDEX_NAME = "index.json"
TABLE_NAME = "index.npy"
MAX_OPEN_SHARDS = 64
"""Open files a process; ImageNet has 1,024 shards and many systems allow 1,024 open files."""


class ShardError(ValueError):
    """A shard folder that cannot be used or written; the message names the file, what is wrong and what to do."""


class SampleError(ValueError):
    """One damaged sample; the message names shard, key, sample number and, from the loader, the stream position."""


@dataclass(frozen=True)
class ShardRecord:
    """One tar file of the folder."""

    name: str
    bytes: int
    sha256: str
    num_samples: int


def table_dtype(key_width: int) -> np.dtype[Any]:
    """Row type of index.npy; `key_width` is the longest key in bytes (keys are ASCII)."""
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
) -> None:
    """Write index.npy, then index.json, each under a temporary name first: a folder without index.json is incomplete."""
    table_path = folder / TABLE_NAME
    with AtomicFile(table_path) as file:
        np.save(file, table, allow_pickle=False)
    content = _content(class_names, shards, _file_sha256(table_path))
    tree = {
        **content,
        "fingerprint": _fingerprint(content),
        "num_samples": len(table),
        "source": source,
        "license": license,
        "request": dict(request),
    }
    with AtomicFile(folder / INDEX_NAME) as file:
        file.write(json.dumps(tree, indent=1).encode())


class ShardIndex:
    """A loaded index. Made by `ShardIndex.load`; cheap to send to a worker (only the path travels)."""

    def __init__(self, folder: Path, tree: Mapping[str, Any], table: np.ndarray) -> None:
        self.folder = folder
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
        self._table = table
        self._files = _OpenShards([folder / shard.name for shard in self.shards])

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """Read and check the index and the shard files' sizes.

        Raises ShardError when the folder is incomplete, a shard is missing or truncated, or the parts disagree.
        """
        path = Path(folder)
        tree = _read_json(path)
        table = _read_table(path, tree)
        index = cls(path, tree, table)
        _check_counts(index, tree)
        _check_shard_files(index)
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (str(self.folder), self.fingerprint)

    def __len__(self) -> int:
        return self.num_samples

    def read(self, sample: int) -> tuple[bytes, int, str]:
        """Image bytes, label and key of sample number `sample`; safe from threads and processes.

        Raises SampleError when the bytes on disk are not the ones that were indexed, IndexError when out of range.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample}: the index of {self.folder} has samples 0 to {self.num_samples - 1}")
        shard, offset, size, label, crc32, key, _ = self._table[sample].item()
        data = self._files.read(shard, offset, size)
        if len(data) != size or zlib.crc32(data) != crc32:
            found = f"only {len(data)} of {size} bytes" if len(data) != size else "other bytes than were indexed (crc32 differs)"
            raise SampleError(f"{self.describe(sample)}: the shard holds {found}; write the shards again or restore the file")
        return data, label, key.decode()

    def describe(self, sample: int) -> str:
        """Where sample number `sample` is, for messages."""
        row = self._table[sample]
        return f"shard {self.folder / self.shards[int(row['shard'])].name}, key {row['key'].decode()}, sample {sample}"


def _reload(folder: str, fingerprint: str) -> ShardIndex:
    """Load in another process, and make sure that it is still the same data."""
    index = ShardIndex.load(folder)
    if index.fingerprint != fingerprint:
        raise ShardError(f"{folder}: fingerprint is {index.fingerprint}, the run began with {fingerprint}; the shards were rewritten")
    return index


class _OpenShard:
    """A file descriptor that closes when nobody uses it any more, so a reader never loses it to eviction."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # `descriptor` is absent when open() failed.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenShards:
    """Least-recently-used cache of open shards; positions are never shared, because reads are `pread`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                file = self._open[shard] = _OpenShard(self._paths[shard])
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(shard)
        return os.pread(file.descriptor, size, offset)


class AtomicFile:
    """Context manager: a binary file that appears under `path` complete and on disk, or not at all.

    Raises OSError naming `path` when it cannot be written (full disk, no permission); nothing is left behind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> BinaryIO:
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
                _sync_folder(self._path.parent)
        except OSError as err:
            error = err
        if error is None:
            return
        with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed by close
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"{error.strerror}; nothing was left under this name, free space or choose another folder"
            raise OSError(error.errno, reason, str(self._path)) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_KEYS = ("format", "class_names", "shards", "table_sha256", "fingerprint", "num_samples", "source", "license", "request")


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ShardError(f"{path}: no such file; the folder holds no complete shards, write them with `m2mkd shards write`")
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
    if _file_sha256(path) != tree["table_sha256"]:
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
        path = index.folder / shard.name
        if not path.is_file():
            raise ShardError(f"{path}: shard is missing ({len(index.shards)} are indexed); copy it here or write the shards again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ShardError(f"{path}: has {size} bytes, the index says {shard.bytes}; it is truncated or changed, copy it again")

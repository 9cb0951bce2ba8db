"""Reading a piece of a shard by number, offset and size, wherever the shards lie.

`ShardFiles` is the door: `LocalFiles` reads shards of a local folder; remote ones and the cache come with their own
files. Readers are safe from threads, and a spawned worker opens its own.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from m2mkd_ds.data_config import DataConfig

MAX_OPEN_SHARDS = 64
"""Open files a process; ImageNet has 1,024 shards and many systems allow 1,024 open files."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How shards that lie elsewhere may be reached; the fields are those of DataConfig."""

    cache_dir: str = ""
    cache_gb: float = 200.0
    look_ahead: int = 16
    deadline_s: float = 300.0
    allow_pipe: bool = False

    @classmethod
    def from_config(cls, data: DataConfig) -> Access:
        """The fields of `data` that say how to reach shards."""
        return cls(
            cache_dir=data.cache_dir, cache_gb=data.cache_gb, look_ahead=data.look_ahead, deadline_s=data.io_deadline_s,
            allow_pipe=data.allow_pipe,
        )  # fmt: skip


@dataclass(frozen=True)
class IoCounts:
    """What was done to get bytes that lie elsewhere."""

    hits: int = 0
    """Reads that found their shard in the cache."""
    misses: int = 0
    """Shards that were fetched into the cache."""
    bytes_fetched: int = 0
    """Bytes that came from elsewhere."""
    retries: int = 0
    """Tries that failed and were made again."""

    def plus(self, other: IoCounts, sign: int = 1) -> IoCounts:
        """The sum; with sign -1 the difference."""
        return IoCounts(*(getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self)))


class ShardFiles(Protocol):
    """Bytes of shards by number."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer when the shard ends before. Raises SampleError(kind="io") when they cannot be had in time."""
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """The shards that will be needed next, in this order: a hint to fetch them. Returns at once."""
        ...

    def counts(self) -> IoCounts:
        """What this process has done so far."""
        ...

    def close(self) -> None:
        """Stop background work; files close with the last reader."""
        ...


class _OpenShard:
    """A file descriptor that closes when nobody uses it any more, so a reader never loses it to eviction."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # `descriptor` is absent when open() failed.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LocalFiles:
    """Shards of a local folder: a least-recently-used cache of open files; positions are never shared, because reads are `pread`."""

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

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing to fetch."""

    def counts(self) -> IoCounts:
        """Nothing lies elsewhere."""
        return IoCounts()

    def close(self) -> None:
        """Nothing runs in the background."""

"""A folder of whole shards that many processes fill and read together, and that never holds more than its cap.

    ROOT/cache.lock                      held for moments: who may grow the folder, and what is evicted
    ROOT/shards/FINGERPRINT/NAME         a complete shard; its modification time is that of its latest use
    ROOT/shards/FINGERPRINT/NAME.part    one that is being fetched, at its full length from the start, so that its bytes count
    ROOT/shards/FINGERPRINT/NAME.lock    held by whoever fetches it: each shard is fetched once, and a .part whose lock is free is a
                                         dead process's and removed

Locks are flock's: they end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.retry import Stopped
from m2mkd_ds.logs import logger

_POLL_S = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OTHER_BYTES = "other bytes came than were indexed (sha256 differs)"


@dataclass(frozen=True)
class Wanted:
    """One shard as it must be when it has arrived."""

    name: str
    """File name in the folder of its data set."""
    bytes: int
    sha256: str
    what: str
    """For messages; without secrets."""


class CachedShard:
    """An open complete shard. It stays readable when it is evicted meanwhile, and closes when nobody uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)

    def is_evicted(self) -> bool:
        """Whether the file has no name any more: its bytes are freed when it is closed."""
        return os.fstat(self.descriptor).st_nlink == 0

    def touch(self) -> None:
        """Mark as used now."""
        with contextlib.suppress(OSError):
            os.utime(self.descriptor)


class ShardCache:
    """The part of a cache folder that belongs to one data set; the cap is over all of the folder. Safe from threads and processes."""

    def __init__(self, root: Path, fingerprint: str, cap_bytes: int) -> None:
        self.root, self.cap_bytes = root, cap_bytes
        self.folder = root / "shards" / fingerprint[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ShardError(f"data.cache_dir is {root}: cannot be written ({err.strerror}); choose a folder on a local disk") from None

    def open(self, name: str, size: int) -> CachedShard | None:
        """The shard if it is there with all of its `size` bytes; this counts as a use."""
        try:
            shard = CachedShard(os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        if os.fstat(shard.descriptor).st_size != size:
            # Not removed here: only who holds the shard's lock may, or it could be the new one that is removed.
            return None
        shard.touch()
        return shard

    def evict(self, name: str, damaged: CachedShard) -> None:
        """Remove the shard, so that the next `fetch` gets it anew; nothing where another process has replaced `damaged` already."""
        path = self.folder / name
        with _locked(self.folder / f"{name}.lock", threading.Event()), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(damaged.descriptor)):
                path.unlink()

    def fetch(
        self, wanted: Wanted, source: Callable[[], Iterator[bytes]], *, stop: threading.Event | None = None, wait: bool = True
    ) -> tuple[CachedShard | None, bool]:
        """The shard, and whether it was fetched here. `source` gives all its bytes from the start.

        Without `wait`, None where another process is at it. Raises ShardError when it does not fit under the cap, when the disk is full
        or when another number of bytes came twice, SampleError(kind="checksum") when other bytes than were indexed came twice, and
        what `source` raises.
        """
        stop = stop or threading.Event()
        if wanted.bytes > self.cap_bytes:
            raise ShardError(
                f"{wanted.what}: has {wanted.bytes} bytes, and data.cache_gb allows {self.cap_bytes} for the whole cache; raise it"
            )
        try:
            with _locked(self.folder / f"{wanted.name}.lock", stop, wait=wait) as held:
                if not held:
                    return None, False
                found = self.open(wanted.name, wanted.bytes)
                return (found, False) if found is not None else (self._arrive(wanted, source, stop), True)
        except OSError as err:
            if err.errno not in _FULL:
                raise ShardError(f"{wanted.what}: cannot be written to data.cache_dir {self.root} ({err.strerror})") from None
            raise ShardError(
                f"{wanted.what}: data.cache_dir {self.root} is full ({err.strerror}) before data.cache_gb is reached; free space or "
                "lower data.cache_gb; the half shard was removed"
            ) from None

    def _arrive(self, wanted: Wanted, source: Callable[[], Iterator[bytes]], stop: threading.Event) -> CachedShard:
        """Fetch under the temporary name, check, rename. The open file is handed on, so an eviction right away does no harm."""
        part = self.folder / f"{wanted.name}.part"
        try:
            for useless in (part, self.folder / wanted.name):  # a dead process's, or of the wrong size: they count against the cap
                useless.unlink(missing_ok=True)
            shard = self._reserve(part, wanted.bytes, stop)
            problem = _fill(shard.descriptor, wanted, source())
            if problem:
                logger.warning("%s: %s; fetching it once more", wanted.what, problem)
                problem = _fill(shard.descriptor, wanted, source())
            if problem:
                problem += ", twice; the shard at its source is not the one that was indexed, restore it or index it again"
                if problem.startswith(_OTHER_BYTES):
                    raise SampleError(f"{wanted.what}: {problem}", "checksum")
                raise ShardError(f"{wanted.what}: {problem}")
            os.fsync(shard.descriptor)
            shard.touch()
            # Under the folder's lock, so that nobody who counts bytes misses the file between its two names.
            with _locked(self.root / "cache.lock", stop):
                os.rename(part, self.folder / wanted.name)
            return shard
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, stop: threading.Event) -> CachedShard:
        """An empty file of full length, made when it fits under the cap: evicts what was unused for longest, waits for other fetches."""
        while True:
            with _locked(self.root / "cache.lock", stop):
                if self._make_room(size):
                    shard = CachedShard(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
                    os.ftruncate(shard.descriptor, size)
                    return shard
            if stop.wait(_POLL_S):
                raise Stopped

    def _make_room(self, size: int) -> bool:
        """Evict until `size` more bytes fit; False when others' fetches take the room. Needs the folder's lock."""
        complete: list[tuple[float, int, Path]] = []
        used = 0
        for path in (self.root / "shards").glob("*/*"):
            if path.suffix == ".lock":
                continue
            if path.suffix == ".part" and _remove_if_orphan(path):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # a fetch failed meanwhile and took its .part with it
                continue
            used += stat.st_size
            if path.suffix != ".part":
                complete.append((stat.st_mtime, stat.st_size, path))
        complete.sort()
        if used - sum(freed for _, freed, _ in complete) + size > self.cap_bytes:
            return False
        for _, freed, path in complete:
            if used + size <= self.cap_bytes:
                break
            path.unlink(missing_ok=True)
            used -= freed
        return used + size <= self.cap_bytes


def _fill(descriptor: int, wanted: Wanted, source: Iterator[bytes]) -> str:
    """Write what comes and hash it; what is wrong with it, or nothing. Never writes beyond the reserved length."""
    digest = hashlib.sha256()
    written = 0
    for chunk in source:
        if written + len(chunk) > wanted.bytes:
            return f"more than the {wanted.bytes} bytes of the index came"
        rest = memoryview(chunk)
        while rest:
            count = os.pwrite(descriptor, rest, written)
            written += count
            rest = rest[count:]
        digest.update(chunk)
    if written != wanted.bytes:
        return f"{written} bytes came, the index says {wanted.bytes}"
    return "" if digest.hexdigest() == wanted.sha256 else _OTHER_BYTES


def _remove_if_orphan(part: Path) -> bool:
    """Remove what a dead process left. Whoever fetches holds the lock, so a free one says that nobody does."""
    with _locked(part.with_suffix(".lock"), threading.Event(), wait=False) as held:
        if held:
            part.unlink(missing_ok=True)
        return held


@contextlib.contextmanager
def _locked(path: Path, stop: threading.Event, *, wait: bool = True) -> Iterator[bool]:
    """Hold an flock; yields False when it is another's and `wait` is off. Polls, so that `stop` ends the waiting. Raises Stopped."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    yield False
                    return
            if stop.wait(_POLL_S):
                raise Stopped
        yield True
    finally:
        os.close(descriptor)

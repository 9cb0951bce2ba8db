"""`ShardFiles` for shards that lie elsewhere: range reads without a cache folder, whole shards through the cache with one."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.addresses import holds_secret, is_remote, join, local_path, redact
from m2mkd_ds.data.remote.cache import CachedShard, ShardCache, Wanted
from m2mkd_ds.data.remote.http_transport import Refused
from m2mkd_ds.data.remote.retry import IoCounter, Retrier, Stopped
from m2mkd_ds.data.remote.transports import Transport, chunks, http_client, open_transport
from m2mkd_ds.data.shard_files import MAX_OPEN_SHARDS, Access, IoCounts, LocalFiles, ShardFiles
from m2mkd_ds.logs import logger

TOUCH_INTERVAL_S = 1.0
"""A shard in use is marked so at most this often; eviction takes the one unmarked for longest."""


class Shard(Protocol):
    """What has to be known of a shard; `ShardRecord` of data/index.py is one."""

    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


def open_files(shards: Sequence[Shard], base: str, fingerprint: str, access: Access, *, named: str) -> ShardFiles:
    """The reader that base and access ask for. `named`: the address the user gave, whose host alone may see M2MKD_HTTP_TOKEN."""
    if access.cache_dir:
        return CachedFiles(shards, base, fingerprint, access, named=named)
    if is_remote(base):
        return RangeFiles(shards, base, access, named=named)
    return LocalFiles([local_path(join(base, shard.name)) for shard in shards])


class _Remote:
    """Transports of the shards, made when first needed, and the size check at that moment."""

    def __init__(self, shards: Sequence[Shard], base: str, access: Access, *, named: str) -> None:
        self.shards, self.base, self.access = shards, base, access
        self.counter = IoCounter()
        self._client = http_client(named, access)
        self._transports: dict[int, Transport] = {}

    def transport(self, shard: int) -> Transport:
        """Of one shard. Raises ShardError for addresses that cannot be used at all."""
        found = self._transports.get(shard)
        if found is None:  # two threads may both make one, and either will do
            found = self._transports[shard] = open_transport(join(self.base, self.shards[shard].name), self.access, self._client)
        return found

    def what(self, shard: int) -> str:
        """Name of the shard for messages."""
        name = self.shards[shard].name
        shown = redact(join(self.base, name))
        return shown if shown.endswith(name) else f"{shown}, shard {name}"

    def check_first(self, retrier: Retrier) -> None:
        """The size of the first shard; the others are checked when they are first used."""
        if self.shards:
            self.check_size(0, retrier)

    def check_size(self, shard: int, retrier: Retrier) -> None:
        """Raise ShardError when the file has another size than the index says."""
        transport = self.transport(shard)
        size = self.tried(shard, retrier, transport.size)
        if size is not None and size != self.shards[shard].bytes:
            raise ShardError(
                f"{self.what(shard)}: has {size} bytes, the index says {self.shards[shard].bytes}; it is truncated or changed, "
                "copy it again or index it again"
            )

    def tried(self, shard: int, retrier: Retrier, attempt: Callable[[float], object]) -> object:
        """`attempt` with retries; what no retry can mend is a ShardError that names the shard."""
        try:
            return retrier.call(self.what(shard), attempt)
        except Refused as err:
            raise ShardError(f"{self.what(shard)}: {err}") from None


class RangeFiles:
    """Reads each sample from where it lies: one range request a sample, on kept-alive connections."""

    def __init__(self, shards: Sequence[Shard], base: str, access: Access, *, named: str) -> None:
        self._remote = _Remote(shards, base, access, named=named)
        self._retrier = Retrier(access.deadline_s, self._remote.counter)
        self._checked: set[int] = set()

    def check_first(self) -> None:
        """Reach the first shard and check its size; the others are checked at their first use.

        Raises ShardError when ranges cannot be read there, SampleError when it cannot be reached in time.
        """
        if self._remote.shards:
            transport = self._remote.transport(0)
            self._remote.tried(0, self._retrier, lambda limit_s: transport.read(0, 1, limit_s))
        self._remote.check_first(self._retrier)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        transport = self._remote.transport(shard)
        data = self._remote.tried(shard, self._retrier, lambda limit_s: transport.read(offset, size, limit_s))
        assert isinstance(data, bytes)
        self._remote.counter.add("bytes_fetched", len(data))
        if shard not in self._checked:
            # After the read, because an http answer to it has told the size already.
            self._remote.check_size(shard, self._retrier)
            self._checked.add(shard)
        return data

    def expect(self, shards: Sequence[int]) -> None:
        """Nothing is fetched ahead: there is no place to keep it."""

    def counts(self) -> IoCounts:
        """What this process has fetched so far."""
        return self._remote.counter.read()

    def close(self) -> None:
        """Nothing runs in the background."""


class CachedFiles:
    """Reads from a folder of whole shards, which are fetched when first needed, or before that after `expect`."""

    def __init__(self, shards: Sequence[Shard], base: str, fingerprint: str, access: Access, *, named: str) -> None:
        self._remote = _Remote(shards, base, access, named=named)
        self._cache = ShardCache(Path(access.cache_dir), fingerprint, round(access.cache_gb * 1e9))
        self._retrier = Retrier(access.deadline_s, self._remote.counter)
        self._open: OrderedDict[int, tuple[CachedShard, float]] = OrderedDict()
        self._failed: dict[int, str] = {}
        self._lock = threading.Lock()
        self._renewed: set[int] = set()
        self._renewing = threading.Lock()
        self._ahead = _Ahead(self._fetch_ahead)
        weakref.finalize(self, self._ahead.end)
        self._ahead_retrier = Retrier(access.deadline_s, self._remote.counter, self._ahead.stop)

    def check_first(self) -> None:
        """Check the size of the first shard where its source tells it; the others are checked when they arrive."""
        self._remote.check_first(self._retrier)
        total, cap = sum(shard.bytes for shard in self._remote.shards), self._remote.access.cache_gb
        if total > cap * 1e9:
            logger.warning(
                "%s: %.1f GB of shards, and data.cache_gb is %g: shards are evicted and fetched again; order=block keeps that rare",
                redact(self._remote.base), total / 1e9, cap,
            )  # fmt: skip

    def read(self, shard: int, offset: int, size: int) -> bytes:
        file: CachedShard | None = self._use(shard)
        fetched = False
        if file is None:
            file, fetched = self._fetch(shard, self._retrier, wait=True)
            assert file is not None
            self._keep(shard, file)
        self._remote.counter.add("misses" if fetched else "hits")
        return os.pread(file.descriptor, size, offset)

    def renew(self, shard: int) -> None:
        """Let go of a shard whose bytes turned out wrong on this disk: the next read fetches it anew, once in the life of a process."""
        with self._renewing:
            with self._lock:
                held, _ = self._open.pop(shard, (None, 0.0))
            damaged = held or self._cache.open(_name(shard), self._remote.shards[shard].bytes)
            if shard not in self._renewed and damaged is not None:
                logger.warning("%s: the copy in %s is damaged; fetching it anew", self._remote.what(shard), self._cache.folder)
                self._cache.evict(_name(shard), damaged)
            self._renewed.add(shard)

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch these in the background, in place of what was expected before. Returns at once."""
        self._ahead.replace(list(shards))

    def counts(self) -> IoCounts:
        """What this process has done so far; workers count for themselves."""
        return self._remote.counter.read()

    def close(self) -> None:
        """Stop fetching ahead."""
        self._ahead.close()

    def _use(self, shard: int) -> CachedShard | None:
        """The shard if it is open here or complete in the folder."""
        with self._lock:
            found = self._open.get(shard)
            if found is not None:
                self._open.move_to_end(shard)
                file, touched = found
                now = time.monotonic()
                if now - touched > TOUCH_INTERVAL_S:
                    file.touch()
                    self._open[shard] = (file, now)
                return file
        cached = self._cache.open(_name(shard), self._remote.shards[shard].bytes)
        if cached is not None:
            self._keep(shard, cached)
        return cached

    def _keep(self, shard: int, file: CachedShard) -> None:
        """Hold the file open; let go of those that were evicted, because their bytes are freed only then."""
        with self._lock:
            for other in [number for number, (held, _) in self._open.items() if held.is_evicted()]:
                del self._open[other]
            self._open[shard] = (file, time.monotonic())
            self._open.move_to_end(shard)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)

    def _fetch(self, shard: int, retrier: Retrier, *, wait: bool) -> tuple[CachedShard | None, bool]:
        if shard in self._failed:
            raise SampleError(self._failed[shard], "checksum")
        record, transport, what = self._remote.shards[shard], self._remote.transport(shard), self._remote.what(shard)
        try:
            return self._cache.fetch(
                Wanted(_name(shard), record.bytes, record.sha256, what),
                lambda: chunks(transport, retrier, what), stop=retrier.stop, wait=wait,
            )  # fmt: skip
        except SampleError as err:
            if err.kind == "checksum":
                # Each of its samples would fetch it twice again.
                self._failed[shard] = str(err)
            raise

    def _fetch_ahead(self, shard: int) -> None:
        if self._cache.open(_name(shard), self._remote.shards[shard].bytes) is not None:
            return
        try:
            _, fetched = self._fetch(shard, self._ahead_retrier, wait=False)
        except (SampleError, ShardError) as err:
            # The read that needs it meets the same fault and raises it where it can be counted.
            logger.warning("fetching ahead: %s", err)
            return
        if fetched:
            self._remote.counter.add("misses")


def _name(shard: int) -> str:
    """File name in the cache: by number, because a shard's own name may hold folders."""
    return f"shard-{shard:06d}.tar"


class _Ahead:
    """One daemon thread that works through the latest list. It ends with the object whose method `work` is, which it does not keep."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self.stop = threading.Event()
        self._work = weakref.WeakMethod(work)
        self._changed = threading.Condition()
        self._pending: list[int] = []
        self._thread: threading.Thread | None = None

    def replace(self, shards: list[int]) -> None:
        """Work on these next, and drop what is left of the list before."""
        with self._changed:
            if self.stop.is_set():
                return
            self._pending = shards
            if shards and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shards ahead", daemon=True)
                self._thread.start()
            self._changed.notify()

    def end(self) -> None:
        """Stop without waiting."""
        self.stop.set()
        with self._changed:
            self._pending = []
            self._changed.notify()

    def close(self) -> None:
        """Stop; waits a moment for a connection that is silent, which then ends by itself at its timeout."""
        self.end()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout=2.0)

    def _run(self) -> None:
        while not self.stop.is_set():
            with self._changed:
                while not self._pending and not self.stop.is_set():
                    self._changed.wait()
                shard = self._pending.pop(0) if self._pending else None
            if shard is not None and not self._worked(shard):
                return

    def _worked(self, shard: int) -> bool:
        """Work on one; False when that was called off. A function of its own, so that nothing of the owner is held while waiting."""
        work = self._work()
        if work is None:
            return False
        try:
            work(shard)
        except Stopped:
            return False
        return True


def check_base(base: str) -> None:
    """Refuse an address with credentials in it where it would be written to a file. Raises ShardError."""
    if holds_secret(base):
        raise ShardError(
            f"base is {redact(base)}, which holds credentials, and index.json keeps no secrets; take them out of the address and put "
            "a token into the environment (M2MKD_HTTP_TOKEN, HF_TOKEN)"
        )

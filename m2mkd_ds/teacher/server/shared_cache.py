"""What several clients ask for is made once: a cache of micro-batches, bounded in bytes, in which one makes and the others wait.

An entry is one micro-batch; its items (decoded images, hidden states, logits) are made one by one by whoever asks first. The least
recently used entries that nobody works on are dropped beyond the bound; so a client far from the others only misses, and what it
gets is made again, the same. Whether something comes from here decides about time alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor

from m2mkd_ds.teacher.server.counters import Counters


class Item(Protocol):
    """Anything with tensors, which nobody may change once it is here."""

    def tensors(self) -> Sequence[Tensor]:
        """Those whose memory counts."""
        ...


_Item = TypeVar("_Item", bound=Item)


class Entry:
    """The items of one micro-batch. Its users hold it; `keep=False` drops it with its last user."""

    def __init__(self, cache: SharedCache) -> None:
        self.keep = True
        self.num_bytes, self.users = 0, 0
        """Guarded by the cache's lock."""
        self._cache = cache
        self._items: dict[Hashable, Any] = {}
        self._memory: set[int] = set()
        self._lock = threading.Lock()

    def get(self, level: str, number: int, make: Callable[[], _Item]) -> _Item:
        """Item `number` of a level; made by the first who asks while the others wait. What `make` raises, only its caller sees.

        `make` must not ask this entry for other items: get those first.
        """
        with self._lock:
            found: _Item | None = self._items.get((level, number))
            self._cache.counters.add(f"{'misses' if found is None else 'hits'}_{level}")
            if found is None:
                found = self._items[level, number] = make()
                self._cache.grew(self, self._new_bytes(found))
            return found

    def _new_bytes(self, item: Item) -> int:
        """Bytes of memory that no other item of the entry shares: on a CPU the image is also the first hidden state."""
        total = 0
        for tensor in item.tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._memory:
                self._memory.add(storage.data_ptr())
                total += storage.nbytes()
        return total


class SharedCache:
    """Entries by key. Beyond `max_bytes` it holds what is being worked on, and nothing else."""

    def __init__(self, max_bytes: int, counters: Counters) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache_bytes is {max_bytes}; it must be 0 (share only what is asked for at the same time) or more")
        self.counters = counters
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return self._num_bytes

    @contextmanager
    def using(self, key: Hashable) -> Iterator[Entry]:
        """The entry of `key`, which stays while the block runs."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry(self)
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.keep and not entry.users:
                    self._drop(key)
                self._trim()

    def grew(self, entry: Entry, num_bytes: int) -> None:
        """An item was added."""
        with self._lock:
            entry.num_bytes += num_bytes
            self._num_bytes += num_bytes
            self._trim()

    def _trim(self) -> None:
        if self._num_bytes <= self._max_bytes:
            return
        for key in [key for key, entry in self._entries.items() if not entry.users]:
            self.counters.add("evicted_batches")
            self._drop(key)
            if self._num_bytes <= self._max_bytes:
                return

    def _drop(self, key: Hashable) -> None:
        self._num_bytes -= self._entries.pop(key).num_bytes

"""What a server counts: sums that only grow, safe to add to from any thread. Gauges are asked for where they are (service.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from m2mkd_ds.teacher.protocol.wire import ErrorCode

LEVELS = ("decode", "prefix", "teacher")
"""What can be had from the cache: decoded images, hidden states h_i, teacher logits."""
_NAMES = (
    "requests", "answers", "images", "bytes_out", "decode_s", "prefix_s", "teacher_s", "cast_s", "poisoned", "evicted_clients",
    "left_clients", "evicted_batches", "replaced_workers", "lost_batches",
    *(f"errors_{code}" for code in get_args(ErrorCode)),
    *(f"{what}_{level}" for what in ("hits", "misses") for level in LEVELS),
)  # fmt: skip


class Counters:
    """Sums by name; all names are there from the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = dict.fromkeys(_NAMES, 0.0)
        self._busy, self._busy_since, self._busy_s = 0, 0.0, 0.0

    def add(self, name: str, value: float = 1.0) -> None:
        """One more, or `value` more."""
        with self._lock:
            self._sums[name] += value

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block, also when it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The producer is at work: time during which several blocks run counts once."""
        with self._lock:
            self._busy += 1
            if self._busy == 1:
                self._busy_since = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                if self._busy == 0:
                    self._busy_s += time.monotonic() - self._busy_since

    def snapshot(self) -> dict[str, float]:
        """All sums, with `busy_s` and the producer's capacity: images answered per second of work."""
        with self._lock:
            busy_s = self._busy_s + (time.monotonic() - self._busy_since if self._busy else 0.0)
            capacity = self._sums["images"] / busy_s if busy_s > 0 else 0.0
            return {**self._sums, "busy_s": busy_s, "capacity_images_per_s": capacity}

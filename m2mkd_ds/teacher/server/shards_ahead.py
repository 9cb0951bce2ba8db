"""Shards that lie elsewhere, fetched before they are needed: for the client that is furthest in the stream.

Those behind it find them in the cache of shards, if it is large enough; following every client would fetch for one what another
one's fetching has just pushed out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from m2mkd_ds.data.order import make_order
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.remote.look_ahead import LookAhead
from m2mkd_ds.data.shard_files import ShardFiles
from m2mkd_ds.teacher.server.layout_batches import Stream

LEAD_S = 120.0
"""A client that led and has not decoded anything for so long leads no more."""


class ShardsAhead:
    """Safe from several threads. `files` are those of the server's own process; its workers find the same cache."""

    def __init__(self, stream: Stream, files: ShardFiles, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._files, self._clock = stream, files, clock
        self._lock = threading.Lock()
        self._furthest, self._led_at = -1, 0.0
        self._following: tuple[BatchLayout, LookAhead] | None = None

    def advance(self, layout: BatchLayout, position: int) -> None:
        """The micro-batch at `position` is being decoded. Returns at once, but for a list of shards at the begin of a window."""
        with self._lock:
            if position < self._furthest and self._clock() - self._led_at < LEAD_S:
                return
            self._furthest, self._led_at = position, self._clock()
            if self._following is None or self._following[0] != layout:
                stream = self._stream
                access, window = stream.index.access, stream.data.order_window
                order = make_order(stream.data, stream.seed, stream.index.shard_sizes, layout)
                self._following = layout, LookAhead(order, self._files, access.look_ahead, window=window)
            self._following[1].advance(position)

    def close(self) -> None:
        """Fetch nothing more."""
        self._files.expect(())

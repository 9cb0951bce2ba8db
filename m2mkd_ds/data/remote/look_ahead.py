"""Telling the files which shards come next, as the stream advances."""

from __future__ import annotations

from m2mkd_ds.data.order import SampleOrder
from m2mkd_ds.data.shard_files import ShardFiles


class LookAhead:
    """Expects the shards that are still needed of the window that the stream is in, and those that follow: `window` + `look_ahead`.

    For the main process, once a batch. `look_ahead` 0 expects nothing.
    """

    def __init__(self, order: SampleOrder, files: ShardFiles, look_ahead: int, *, window: int) -> None:
        self._order, self._files = order, files
        self._limit = window + look_ahead if look_ahead else 0
        self._known = range(0)
        """Positions for which the latest expectation holds."""

    def advance(self, position: int) -> None:
        """The stream is at `position`. A comparison; at its start and in a new window, a list of the epoch's shards."""
        if not self._limit or position in self._known:
            return
        self._known = range(position, self._order.window_end(position))
        self._files.expect(self._next(position))

    def _next(self, position: int) -> list[int]:
        """By first need from `position` on, each once; behind the end of the epoch the next one's."""
        shards = list(self._order.shards_ahead(position))
        if len(shards) < self._limit:
            next_epoch = (position // self._order.epoch_length + 1) * self._order.epoch_length
            shards = list(dict.fromkeys([*shards, *self._order.shards_ahead(next_epoch)]))
        return shards[: self._limit]

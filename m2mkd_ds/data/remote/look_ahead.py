"""Telling the files which shards come next, as the stream advances."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from m2mkd_ds.data.order import SampleOrder
from m2mkd_ds.data.shard_files import ShardFiles


class LookAhead:
    """Expects the next `look_ahead` shards that the stream has not begun with. For the main process, once a batch."""

    def __init__(self, order: SampleOrder, files: ShardFiles, look_ahead: int) -> None:
        self._order, self._files, self._look_ahead = order, files, look_ahead
        self._epoch = -1
        self._starts: list[int] = []
        self._shards: list[int] = []
        self._begun = -1

    def advance(self, position: int) -> None:
        """The stream is at `position`. Costs a search in a list of shards; twice an epoch, a list of shards."""
        if self._look_ahead < 1:
            return
        epoch = position // self._order.epoch_length
        if epoch != self._epoch:
            self._epoch, self._begun = epoch, -1
            self._list(self._order.shard_starts(epoch))
        begun = bisect_right(self._starts, position)
        if begun == self._begun:
            return
        self._begun = begun
        if begun + self._look_ahead > len(self._starts):
            # The end of the epoch is in sight: what comes next is the head of the next one.
            self._list([*zip(self._starts, self._shards, strict=True), *self._order.shard_starts(epoch + 1)])
        self._files.expect(self._shards[begun : begun + self._look_ahead])

    def _list(self, starts: Sequence[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in starts]
        self._shards = [shard for _, shard in starts]

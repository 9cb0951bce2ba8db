"""Facts of the look-ahead: what is expected is what the stream, walked by hand, begins with next."""

from __future__ import annotations

import pytest

from m2mkd_ds.data.order import StreamOrder
from m2mkd_ds.data.remote.look_ahead import LookAhead


class Listening:
    """ShardFiles that notes what is expected."""

    def __init__(self) -> None:
        self.expected: list[list[int]] = []

    def read(self, shard: int, offset: int, size: int) -> bytes:
        raise AssertionError("nothing is read")

    def expect(self, shards: object) -> None:
        self.expected.append(list(shards))  # type: ignore[call-overload]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("mode", "repeats"), [("block", 1), ("block", 2), ("global", 1)])
def test_the_next_shards_are_expected_when_the_stream_begins_another(mode: str, repeats: int) -> None:
    sizes = [5, 3, 0, 6, 4, 1, 5]
    order = StreamOrder(3, sizes, mode=mode, window=2, repeats=repeats)  # type: ignore[arg-type]
    owner = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    positions = range(2 * order.epoch_length)
    # By a plain walk: the (epoch, shard) pairs in the order in which the stream meets them.
    met: list[tuple[int, int]] = []
    for position in range(3 * order.epoch_length):
        slot = order.slot(position)
        if (slot.epoch, owner[slot.sample]) not in met:
            met.append((slot.epoch, owner[slot.sample]))
    files = Listening()
    ahead = LookAhead(order, files, 2)
    begun = 0
    for position in positions:
        before = len(files.expected)
        ahead.advance(position)
        slot = order.slot(position)
        place = met.index((slot.epoch, owner[slot.sample])) + 1
        if place > begun:
            begun = place
            assert [shard for _, shard in met[begun : begun + 2]] == files.expected[-1]
        else:
            assert len(files.expected) == before
    # Six shards with samples an epoch, and a look at the border when a new epoch is listed.
    assert len(files.expected) == 12


def test_a_stream_that_starts_anywhere_expects_the_same() -> None:
    order = StreamOrder(0, [4] * 6, mode="block", window=1)
    for position in range(24):
        files = Listening()
        LookAhead(order, files, 3).advance(position)
        ahead = [shard for shard in order.shards_ahead(position)][1:4]
        assert files.expected[0][: len(ahead)] == ahead
        assert len(files.expected[0]) == 3


def test_no_look_ahead_expects_nothing() -> None:
    files = Listening()
    LookAhead(StreamOrder(0, [4, 4]), files, 0).advance(0)
    assert files.expected == []

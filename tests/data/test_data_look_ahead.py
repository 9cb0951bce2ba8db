"""Facts of the look-ahead: what is expected is what the stream, walked by hand, still needs of its window and what follows."""

from __future__ import annotations

import pytest

from m2mkd_ds.data.order import StreamOrder
from m2mkd_ds.data.remote.look_ahead import LookAhead

SIZES = [5, 3, 0, 6, 4, 1, 5, 2, 7]
OWNER = [shard for shard, size in enumerate(SIZES) for _ in range(size)]


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


def needed_from(order: StreamOrder, position: int) -> list[int]:
    """By a plain walk: shards by first need in the rest of this epoch, then in the next one, each once."""
    found: list[int] = []
    for p in range(position, (position // order.epoch_length + 2) * order.epoch_length):
        shard = OWNER[order.slot(p).sample]
        if shard not in found:
            found.append(shard)
    return found


@pytest.mark.parametrize(("mode", "repeats"), [("block", 1), ("block", 2), ("global", 1), ("global", 2)])
def test_a_stream_that_starts_anywhere_expects_all_it_needs_of_its_window_and_what_follows(mode: str, repeats: int) -> None:
    order = StreamOrder(3, SIZES, mode=mode, window=3, repeats=repeats)  # type: ignore[arg-type]
    for position in range(2 * order.epoch_length):
        files = Listening()
        LookAhead(order, files, 2, window=3).advance(position)
        assert files.expected == [needed_from(order, position)[:5]]


@pytest.mark.parametrize("repeats", [1, 2])
def test_it_is_told_anew_where_a_window_begins_and_only_there(repeats: int) -> None:
    order = StreamOrder(3, SIZES, mode="block", window=3, repeats=repeats)
    # Nine shards an epoch make three windows. A window's shards are those that are used between its borders and nowhere else.
    files = Listening()
    ahead = LookAhead(order, files, 2, window=3)
    borders = []
    for position in range(2 * order.epoch_length):
        before = len(files.expected)
        ahead.advance(position)
        if len(files.expected) > before:
            borders.append(position)
            assert files.expected[-1] == needed_from(order, position)[:5]
    assert len(borders) == 6 and borders[3] == order.epoch_length
    owners = [{OWNER[order.slot(p).sample] for p in range(*ends)} for ends in zip(borders, [*borders[1:], 2 * order.epoch_length])]  # noqa: B905
    for epoch in (owners[:3], owners[3:]):
        assert sum(len(window) for window in epoch) == len(set().union(*epoch)) == 8  # one shard is empty
        assert all(2 <= len(window) <= 3 for window in epoch)


def test_a_global_order_is_told_once_an_epoch() -> None:
    order = StreamOrder(3, SIZES)
    files = Listening()
    ahead = LookAhead(order, files, 2, window=3)
    for position in range(2 * order.epoch_length):
        ahead.advance(position)
    assert files.expected == [needed_from(order, 0)[:5], needed_from(order, order.epoch_length)[:5]]


def test_no_look_ahead_expects_nothing() -> None:
    files = Listening()
    LookAhead(StreamOrder(0, [4, 4]), files, 0, window=2).advance(0)
    assert files.expected == []

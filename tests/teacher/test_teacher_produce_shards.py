"""A server whose shards lie elsewhere: the same bytes, and shards fetched ahead for the client that leads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest
from m2mkd_ds.teacher.server.layout_batches import Stream
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.shards_ahead import LEAD_S, ShardsAhead
from tests.data.faulty_server import FaultyServer
from tests.data.tar_files import image_file
from tests.teacher.asking import ALL, LAYOUT, asked, assert_same, colocated
from tests.teacher.conftest import make_parts


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    """Ten shards of eight images, over HTTP on loopback."""
    samples = [(image_file(i, "PNG", (16, 16)), "png", i % 10, f"k{i:02d}") for i in range(80)]
    write_shards(samples, tmp_path / "there", total=80, class_names=tuple("abcdefghij"), source="s", license="MIT", samples_per_shard=8)
    served = FaultyServer(tmp_path / "there")
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()
    thread.join(10)


def test_shards_from_elsewhere_give_the_same_bytes_and_are_fetched_ahead(
    server: FaultyServer, tmp_path: Path, tiny_config: RunConfig
) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, order="block", order_window=2))
    ours = colocated(config, ShardIndex.load(tmp_path / "there"), num_steps=2)
    index = ShardIndex.load(server.url, Access(cache_dir=str(tmp_path / "cache"), cache_gb=1.0, look_ahead=3, deadline_s=20))
    producer = Producer(make_parts(config, index))
    try:
        before = server.asked(".tar")  # the look at the first shard when the index was loaded
        assert_same(producer.answer(asked(None, 0)).tensors, ours[0])
        # The window of two shards and the three after it come, though four images need two shards at most.
        waited = threading.Event()
        for _ in range(500):
            if server.asked(".tar") - before >= 5:
                break
            waited.wait(0.02)
        waited.wait(0.2)
        assert server.asked(".tar") - before == 5
        for start, batch in ours.items():
            assert_same(producer.answer(asked(None, start)).tensors, batch)
    finally:
        producer.close()


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


def test_shards_are_fetched_for_who_leads_and_for_who_is_left(server: FaultyServer, tmp_path: Path, tiny_config: RunConfig) -> None:
    index = ShardIndex.load(tmp_path / "there", Access(look_ahead=1))
    data = replace(tiny_config.data, order="block", order_window=2)
    now, files = [0.0], Listening()
    ahead = ShardsAhead(Stream(index, data, seed=3), files, lambda: now[0])
    ahead.advance(LAYOUT, 32)  # windows of 16 positions: the third
    (third,) = files.expected
    assert len(third) == 3
    ahead.advance(LAYOUT, 0)
    ahead.advance(LAYOUT, 36)
    assert files.expected == [third]
    ahead.advance(LAYOUT, 48)
    assert len(files.expected) == 2 and third[2] == files.expected[1][0]  # what was one ahead is needed now
    now[0] += LEAD_S
    ahead.advance(LAYOUT, 0)  # the leader is gone
    assert len(files.expected) == 3
    ahead.close()
    assert files.expected[-1] == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_tells_what_its_cache_did_whoever_read(
    server: FaultyServer, tmp_path: Path, tiny_config: RunConfig, num_workers: int
) -> None:
    data = replace(tiny_config.data, num_workers=num_workers)
    index = ShardIndex.load(server.url, Access(cache_dir=str(tmp_path / "cache"), cache_gb=1.0, look_ahead=3, deadline_s=20))
    parts = make_parts(tiny_config, index)
    loader = TrainLoader(
        index, data, seed=7, micro_batch_size=LAYOUT.micro_batch_size, accumulation=LAYOUT.accumulation, rank=0, world=LAYOUT.world,
        start_step=0, total_steps=4,
    )  # fmt: skip
    feed = ColocatedFeed(loader, parts.pairs, parts.meta, parts.teachers, device=parts.device, dtype=parts.dtype)
    sums = Counter[str]()
    try:
        for number in range(8):
            step, micro_step = divmod(number, 2)
            feed.batch(BatchRequest(step, micro_step, LAYOUT.positions(step, micro_step, 0), ALL, True))
            sums.update(feed.metrics())
        deadline = time.monotonic() + 10
        while True:  # shards that are expected may still arrive
            there = [path.stat().st_size for path in (tmp_path / "cache").glob("shards/*/*.tar")]
            sums.update(feed.metrics())
            if sums["data/cache_misses"] == len(there) and not list((tmp_path / "cache").glob("shards/*/*.part")):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        feed.close()
    assert sums["data/cache_bytes"] == sum(there) and len(there) > 4
    # Of 8 * 4 reads, those that fetched their shard themselves are no hits; others may have come ahead.
    assert 32 - len(there) <= sums["data/cache_hits"] <= 32


def test_shards_of_a_folder_have_no_cache_to_tell_of(server: FaultyServer, tmp_path: Path, tiny_config: RunConfig) -> None:
    index = ShardIndex.load(tmp_path / "there")
    parts = make_parts(tiny_config, index)
    loader = TrainLoader(
        index, tiny_config.data, seed=7, micro_batch_size=4, accumulation=1, rank=0, world=1, start_step=0, total_steps=1
    )  # fmt: skip
    feed = ColocatedFeed(loader, parts.pairs, parts.meta, parts.teachers, device=parts.device, dtype=parts.dtype)
    feed.batch(BatchRequest(0, 0, range(4), ALL, True))
    assert feed.metrics() == {}
    feed.close()

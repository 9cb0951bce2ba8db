"""Thousands of micro-batches through the real transports: every slot once, in order, and memory, descriptors and threads stay flat."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import RunConfig, TeacherConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.client.connect import connect
from m2mkd_ds.teacher.client.receive import Assembler
from m2mkd_ds.teacher.client.remote import RemoteFeed, Stream
from m2mkd_ds.teacher.feed import BatchRequest
from m2mkd_ds.teacher.flight.security import ServerSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.protocol.answer_check import answer_shapes
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from m2mkd_ds.teacher.shm.server import ShmTransport
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=2, accumulation=1, world=1)
BATCHES, WARM_UP = 4000, 1000
GROWTH_KB = 16 * 1024
"""Allowed between the two measurements: far below one answer in a hundred being kept, which would be some 100 MB."""


def memory_kb() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture(params=["flight", "shm"])
def endpoint(request: pytest.FixtureRequest, tiny_config: RunConfig, tiny_index: ShardIndex, tmp_path: Path) -> Iterator[str]:
    # Without a cache, which grows to its own bound.
    producer = Producer(make_parts(tiny_config, tiny_index), cache_bytes=0)
    service = TeacherService(producer, tiny_fingerprints(tiny_config, tiny_index), ServiceOptions(limits=LIMITS, max_bytes=2**28))
    is_flight = request.param == "flight"
    transport = FlightTransport(service, "127.0.0.1:0", ServerSecurity()) if is_flight else ShmTransport(service, str(tmp_path / "s"))
    transport.start()
    yield transport.endpoint
    transport.stop(1.0)
    service.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_batches_leave_nothing_behind(endpoint: str, tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    kind = "shm" if endpoint.startswith("unix:") else "remote"
    config = TeacherConfig(feed=kind, endpoints=(endpoint,), deadline_s=20.0, patience_s=60.0)  # type: ignore[arg-type]
    stream = Stream(
        layout=LAYOUT, rank=0, start_step=0, total_steps=BATCHES, pairs=(0, 1, 2), with_teacher=True,
        fingerprints=tiny_fingerprints(tiny_config, tiny_index),
    )  # fmt: skip
    assembler = Assembler(
        tiny_config.data, parts.pairs, parts.meta, answer_shapes(tiny_config, precision="fp32"), device=parts.device, dtype=torch.float32
    )
    feed = RemoteFeed(stream, config, assembler, lambda where: connect(where, config), None, None)
    measured: list[tuple[int, int, int]] = []
    for step in range(BATCHES):
        if step in (WARM_UP, BATCHES - 10):  # while more are asked for, both times
            measured.append((memory_kb(), *held()))
        request = BatchRequest(step, 0, LAYOUT.positions(step, 0, 0), (0, 1, 2), True)
        batch = feed.batch(request)
        assert batch.slot_ids_B.tolist() == list(request.slots)
    metrics = feed.metrics()
    feed.close()
    (memory, descriptors, threads), (memory_after, descriptors_after, threads_after) = measured
    assert memory_after - memory < GROWTH_KB, measured
    # Requests that are under way have connections and threads of their own: a few more or less, not some a batch.
    assert abs(descriptors_after - descriptors) < 10 and abs(threads_after - threads) < 10, measured
    assert metrics["teacher/retries"] == metrics["teacher/failovers"] == metrics["teacher/corrupt"] == 0

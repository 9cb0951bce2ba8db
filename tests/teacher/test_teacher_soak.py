"""A few hundred micro-batches from three servers that fail in every way at random: nothing lost, nothing twice, nothing piling up."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, LinkError
from tests.left_over import running
from tests.teacher.conftest import LIMITS
from tests.teacher.town import Town, assert_same, feeds_of, make_setting, requests, teacher_config

LAYOUT = BatchLayout(micro_batch_size=2, accumulation=1, world=1)
STEPS = 300
SEEDS = (1,)
ENDPOINTS = ("a:1", "b:1", "c:1")

FAULTS = {
    "none": 30, "slow": 2, "deadline": 1, "closed": 1, "corrupt": 1, "short": 1, "old": 1, "attempt": 1, "busy": 1, "internal": 1,
    "kill": 1, "drain": 1, "revive": 8,
}  # fmt: skip
"""What may happen to a request, and how often."""


class Chaos:
    """Draws what happens to each request; every third one or so meets a fault."""

    def __init__(self, town: Town, seed: int) -> None:
        self._town, self._random, self._lock = town, random.Random(seed), threading.Lock()
        self._last: Answer | None = None
        self.met: Counter[str] = Counter()

    def __call__(self, endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        with self._lock:
            kind = self._random.choices(list(FAULTS), list(FAULTS.values()))[0]
            self.met[kind] += 1
            services = self._town.services
            serving = [name for name, service in services.items() if not service.status().draining]
            if kind == "revive":
                for name in set(ENDPOINTS) - set(serving):
                    self._town.start(name)
            elif kind in ("kill", "drain") and endpoint in serving and len(serving) > 1:  # one is left to draw "revive"
                services[endpoint].drain()
                if kind == "kill":
                    del services[endpoint]
        if kind == "slow":
            time.sleep(0.02)
        refusals = {
            "deadline": LinkError("deadline", "late"), "closed": LinkError("closed", "reset"), "corrupt": LinkError("corrupt", "flipped"),
            "busy": FeedError("retry_later", "too much", retry_after_s=0.01), "internal": FeedError("internal", "a bug"),
        }  # fmt: skip
        if kind in refusals:
            raise refusals[kind]
        got = answer()
        with self._lock:
            old, self._last = self._last, got
        if kind == "short":
            return Answer(got.head, {name: tensor for name, tensor in got.tensors.items() if name != "targets"})
        if kind == "old" and old is not None:
            return old
        if kind == "attempt":
            return Answer(replace(got.head, attempt=got.head.attempt + 1), got.tensors)
        return got


def memory_kb() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_lost_repeated_or_piled_up_by_random_faults(tiny_config: RunConfig, tiny_index: ShardIndex, seed: int) -> None:
    setting = make_setting(tiny_config, tiny_index, cache_bytes=0)
    expected = setting.expected(layout=LAYOUT, total_steps=STEPS)
    town = setting.town(*ENDPOINTS, limits=replace(LIMITS, heartbeat_s=0.05))
    chaos = town.fault = Chaos(town, seed)
    seen: list[tuple[int, int, int]] = []
    before = running()
    with feeds_of(setting) as open_feed:
        feed = open_feed(town, teacher_config(*ENDPOINTS, prefetch=4, patience_s=30.0), layout=LAYOUT, total_steps=STEPS)
        for number, request in enumerate(requests(layout=LAYOUT, total_steps=STEPS)):
            assert_same(feed.batch(request), expected[number])
            if number % 100 == 99:
                seen.append((memory_kb(), len(os.listdir("/proc/self/fd")), len(running() - before)))
        told = feed.metrics()
    assert chaos.met.keys() == FAULTS.keys() and told["teacher/retries"] > 30 and told["teacher/failovers"] > 5
    # A batch is 22 kB: were all kept, 200 batches would be 4 MB; connections, services and threads come and go by the dozen.
    (first_kb, first_fds, _), *_, (last_kb, last_fds, _) = seen
    assert last_kb - first_kb < 3000 and last_fds <= first_fds
    assert max(threads for _, _, threads in seen) <= 4 + 1 + len(ENDPOINTS)  # fetching, keeper, one a server

"""Teacher servers of a test: real services by endpoint, that can be killed, started anew, slowed and made to lie."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from m2mkd_ds.config import RunConfig, TeacherConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.client.links import Pace
from m2mkd_ds.teacher.client.receive import Assembler
from m2mkd_ds.teacher.client.remote import RemoteFeed, Stream
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.teacher.protocol.answer_check import AnswerShapes, answer_shapes
from m2mkd_ds.teacher.protocol.codec import Accept
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.wire import Answer, GetBatch, Hello, Limits, LinkError, Status, Welcome
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints

PACE = Pace(first_pause_s=0.01, longest_pause_s=0.04, drained_pause_s=0.05, poll_s=0.02, close_s=2.0)
LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)
STEPS = 5
PAIRS = (0, 1, 2)

Fault = Callable[[str, GetBatch, Callable[[], Answer]], Answer]
"""(endpoint, request, what answers it) -> the answer that the trainer gets."""


class Town:
    """`services` by endpoint may be changed at any time. All share one producer: decoding draws from the process's random numbers."""

    def __init__(self, producer: Producer, prints: Mapping[str, str], *endpoints: str, limits: Limits = LIMITS) -> None:
        self._producer, self._prints, self._limits = producer, prints, limits
        self.services: dict[str, TeacherService] = {}
        self.fault: Fault = lambda endpoint, request, answer: answer()
        self.status_fault: Callable[[str], None] = lambda endpoint: None
        self.is_sticky = False
        """Whether a connection outlives its server and goes on with the next one there, as a transport without connections would."""
        self.asked: Counter[str] = Counter()
        self.beats: Counter[str] = Counter()
        self.greeted: list[str] = []
        for endpoint in endpoints:
            self.start(endpoint)

    def start(self, endpoint: str, others: tuple[str, ...] = ()) -> TeacherService:
        """A new server at `endpoint`, in place of the one that may be there."""
        options = ServiceOptions(limits=self._limits, max_bytes=2**28, endpoints=others)
        self.services[endpoint] = TeacherService(self._producer, self._prints, options)
        return self.services[endpoint]

    def kill(self, endpoint: str) -> None:
        """Nobody answers there from now on."""
        del self.services[endpoint]

    def connect(self, endpoint: str) -> TownConnection:
        """For RemoteFeed."""
        if endpoint not in self.services:
            raise LinkError("unreachable", f"{endpoint}: nobody listens")
        return TownConnection(self, endpoint)


class TownConnection(LocalConnection):
    """A connection whose server may be gone at the next call."""

    def __init__(self, town: Town, endpoint: str) -> None:
        super().__init__(town.services[endpoint], endpoint)
        self._town = town

    def hello(self, hello: Hello, deadline_s: float) -> Welcome:
        self._check_alive()
        self._town.greeted.append(self.endpoint)
        return super().hello(hello, deadline_s)

    def get(self, request: GetBatch, deadline_s: float, accept: Accept | None = None) -> Answer:
        self._check_alive()
        self._town.asked[self.endpoint] += 1
        answer = self._town.fault(self.endpoint, request, lambda: LocalConnection.get(self, request, deadline_s))
        self._check_alive()
        return self._decoded(answer, accept)  # what the fault made of it came over the wire

    def status(self, deadline_s: float) -> Status:
        self._town.beats[self.endpoint] += 1
        self._check_alive()
        self._town.status_fault(self.endpoint)
        return super().status(deadline_s)

    def _check_alive(self) -> None:
        now = self._town.services.get(self.endpoint)
        if self._town.is_sticky and now is not None:
            self._service = now
        if self._service is not now or self._closed:
            raise LinkError("closed", f"{self.endpoint}: the connection was closed")


@dataclass(frozen=True)
class Setting:
    """A tiny run: what trainer, servers and the undisturbed run that they are compared with are made from."""

    config: RunConfig
    index: ShardIndex
    producer: Producer
    """Its models are those of the trainer and of the undisturbed run, too: nobody changes them."""
    cache: dict[tuple[BatchLayout, int, int], list[TeacherBatch]] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> AnswerShapes:
        return answer_shapes(self.config, precision="fp32")

    @property
    def prints(self) -> dict[str, str]:
        return tiny_fingerprints(self.config, self.index)

    def town(self, *endpoints: str, limits: Limits = LIMITS) -> Town:
        return Town(self.producer, self.prints, *endpoints, limits=limits)

    def colocated(self, start_step: int = 0, *, rank: int = 0, layout: BatchLayout = LAYOUT, total_steps: int = STEPS) -> ColocatedFeed:
        """The undisturbed feed."""
        loader = TrainLoader(
            self.index, self.config.data, seed=self.config.seed, micro_batch_size=layout.micro_batch_size,
            accumulation=layout.accumulation, rank=rank, world=layout.world, start_step=start_step, total_steps=total_steps,
        )  # fmt: skip
        parts = self.producer.parts
        return ColocatedFeed(loader, parts.pairs, parts.meta, parts.teachers, device=parts.device, dtype=parts.dtype)

    def expected(self, *, rank: int = 0, layout: BatchLayout = LAYOUT, total_steps: int = STEPS) -> list[TeacherBatch]:
        """All micro-batches of a rank, as the undisturbed feed gives them. To be called before any server is asked."""
        key = (layout, rank, total_steps)
        if key not in self.cache:
            feed = self.colocated(rank=rank, layout=layout, total_steps=total_steps)
            self.cache[key] = [feed.batch(r) for r in requests(rank=rank, layout=layout, total_steps=total_steps)]
        return self.cache[key]

    def remote(
        self, town: Town, config: TeacherConfig, *, start_step: int = 0, rank: int = 0, layout: BatchLayout = LAYOUT,
        total_steps: int = STEPS, pairs: tuple[int, ...] = PAIRS, pace: Pace = PACE, golden: Callable[..., None] | None = None,
        fallback: Callable[[int], TeacherFeed] | None = None, with_teacher: bool = True,
    ) -> RemoteFeed:  # fmt: skip
        stream = Stream(
            layout=layout, rank=rank, start_step=start_step, total_steps=total_steps, pairs=pairs, with_teacher=with_teacher,
            fingerprints=self.prints,
        )  # fmt: skip
        parts = self.producer.parts
        assembler = Assembler(self.config.data, parts.pairs, parts.meta, self.shapes, device=torch.device("cpu"), dtype=torch.float32)
        return RemoteFeed(stream, config, assembler, town.connect, golden, fallback, pace=pace)


def make_setting(config: RunConfig, index: ShardIndex, *, cache_bytes: int = 2**24) -> Setting:
    """With the undisturbed run of rank 0 made already. `cache_bytes`: of the servers."""
    setting = Setting(config, index, Producer(make_parts(config, index), cache_bytes=cache_bytes))
    setting.expected()
    return setting


@contextmanager
def feeds_of(setting: Setting) -> Iterator[Callable[..., RemoteFeed]]:
    """open_feed(town, config, ...) -> a feed; all are closed at the end, when no thread of theirs may be left."""
    before = set(threading.enumerate())
    made: list[RemoteFeed] = []

    def open_feed(town: Town, config: TeacherConfig, **fields: object) -> RemoteFeed:
        made.append(setting.remote(town, config, **fields))  # type: ignore[arg-type]
        return made[-1]

    yield open_feed
    for feed in made:
        feed.close()
    # gRPC's own threads (daemonic, without a name of ours) are listed once they wrote to the log; they belong to the server.
    left = {thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)} - before
    assert not left, left


def wait_until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Fails when it does not become true in time."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def teacher_config(*endpoints: str, **fields: object) -> TeacherConfig:
    """Short times; endpoints as given, `a:1` if none."""
    settings = replace(TeacherConfig(feed="remote", endpoints=endpoints or ("a:1",), deadline_s=2.0, patience_s=4.0))
    return replace(settings, **fields)  # type: ignore[arg-type]


def requests(
    start_step: int = 0, *, rank: int = 0, layout: BatchLayout = LAYOUT, total_steps: int = STEPS, pairs: tuple[int, ...] = PAIRS
) -> list[BatchRequest]:
    """All that a trainer asks for, in order."""
    return [
        BatchRequest(step, micro_step, layout.positions(step, micro_step, rank), pairs, True)
        for step in range(start_step, total_steps)
        for micro_step in range(layout.accumulation)
    ]


def assert_same(ours: TeacherBatch, expected: TeacherBatch) -> None:
    """Bit for bit."""
    assert ours.slot_ids_B.tolist() == expected.slot_ids_B.tolist()
    assert ours.hidden.keys() == expected.hidden.keys() and ours.teacher_logits.keys() == expected.teacher_logits.keys()
    pairs = [(ours.hidden[i], expected.hidden[i]) for i in ours.hidden] + [(ours.targets_BV, expected.targets_BV)]
    pairs += [(ours.teacher_logits[i], expected.teacher_logits[i]) for i in ours.teacher_logits]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert (ours.bad, ours.lost, ours.fallbacks) == (expected.bad, expected.lost, expected.fallbacks)


def run_out(feed: TeacherFeed, expected: list[TeacherBatch], first: int = 0, **fields: object) -> None:
    """Ask for everything from micro-batch `first` on, in order, and compare each with the undisturbed run."""
    for request, batch in list(zip(requests(**fields), expected, strict=True))[first:]:  # type: ignore[arg-type]
        assert_same(feed.batch(request), batch)


class Once:
    """True the first `times` times that it is asked about a key."""

    def __init__(self, times: int = 1) -> None:
        self._times, self._seen, self._lock = times, dict[object, int](), threading.Lock()

    def __call__(self, key: object) -> bool:
        with self._lock:
            self._seen[key] = self._seen.get(key, 0) + 1
            return self._seen[key] <= self._times

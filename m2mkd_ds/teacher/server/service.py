"""A teacher server without a transport: greets, answers, limits and drains. Transports (flight/server.py, shm/server.py) call it.

Safe to call from several threads: every transport brings its own. A transport takes `answering`, and lets go of the lease once the
bytes are sent or the client is gone: until then they count against the server's bound.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.handshake import GOLDEN_IMAGES, check_hello, golden_answer, plan_digest
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, Answer, FeedError, GetBatch, Golden, Hello, Limits, Payload, Status, Welcome
from m2mkd_ds.teacher.server.admission import Admission, Caller, Lease
from m2mkd_ds.teacher.server.decode_worker import DecodeError
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.requests import check_start, check_stream

log = logging.getLogger("m2mkd_ds")


MAX_INTERNAL_ERRORS = 5
"""One after another; then the server is not ready: a device may be lost for good, and whoever watches /ready shall start another one."""


@dataclass(frozen=True)
class ServiceOptions:
    """What an operator grants."""

    limits: Limits
    max_bytes: int
    """Of all answers that are being made or sent; more is refused with retry_later. At least limits.max_in_flight of the largest
    answers times the clients that shall not wait for each other."""
    endpoints: tuple[str, ...] = ()
    """Other servers, named to clients while this one drains."""


class TeacherService:
    """One running server's answers."""

    def __init__(
        self, producer: Producer, fingerprints: Mapping[str, str], options: ServiceOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.producer, self.options = producer, options
        self.instance = secrets.token_hex(16)
        self._fingerprints = dict(fingerprints)
        self._counters = producer.counters
        self._admission = Admission(options.limits, options.max_bytes, self._counters, clock)
        self._plan = lru_cache(64)(self._plan_of)
        self._draining = threading.Event()
        self._internal_errors = 0
        """Since the last answer; threads may lose a count to each other, and the next error makes up for it."""

    def hello(self, hello: Hello, caller: Caller = Caller()) -> Welcome:  # noqa: B008  # frozen
        """Raises FeedError: mismatch naming the field and both values, bad_request for a stream that this server cannot serve."""
        with self._counted():
            self._refuse_draining()
            check_hello(hello, self._fingerprints, self.options.limits)
            check_stream(hello, self.producer.pairs, self.options.limits)
            self._check_layout(hello.layout, hello.payload)
            if self._admission.heard(hello.client, caller):
                log.info(
                    "teacher server %s: greeted client %s of %s: rank %d of %d, pairs %s, payload %s as %s", self.instance[:8],
                    hello.client, caller.host, hello.rank, hello.layout.world, list(hello.pairs), hello.payload, hello.wire_dtype,
                )  # fmt: skip
            return Welcome(
                protocol=PROTOCOL_VERSION, instance=self.instance, plan=self._plan(hello.layout), fingerprints=self._fingerprints,
                limits=self.options.limits,
            )  # fmt: skip

    def golden(self, request: Golden) -> Answer:
        """Outputs for the synthetic images, whose bytes count until this returns. Raises FeedError."""
        with self.golden_answering(request) as answer:
            return answer

    def golden_answering(self, request: Golden) -> Lease[Answer]:
        """Outputs for the synthetic images, whose bytes count until the lease is released. Raises FeedError."""
        with self._counted():
            self._refuse_draining()
            self._same_instance(request.instance)
            absent = sorted(set(request.pairs) - set(self.producer.pairs))
            if absent:
                raise FeedError("bad_request", f"pairs: pair {absent[0]} is not served; this server has {sorted(self.producer.pairs)}")
            # Of no client: a trainer that greets holds no answer yet, and a Golden does not say whose it is.
            admitted = self._admission.admit(None, self.producer.golden_bytes(GOLDEN_IMAGES, request.pairs))
            try:
                with self.producer.turns:
                    answer = golden_answer(self.producer.parts, request)
            except BaseException:
                admitted()
                raise
            self._internal_errors = 0
            return Lease(answer, admitted)

    def get(self, request: GetBatch) -> Answer:
        """One micro-batch, whose bytes count until this returns: for callers in the same process. Raises FeedError."""
        with self.answering(request) as answer:
            return answer

    def answering(self, request: GetBatch) -> Lease[Answer]:
        """One micro-batch, whose bytes count until the lease is released. Raises FeedError, before any work where the request is bad.

        The tensors may be the cache's: they are sent, or copied, never changed.
        """
        with self._counted():
            self._refuse_draining()
            self._same_instance(request.instance)
            admitted = self._admission.admit(request.client, self._checked_bytes(request))
            try:
                answer = self._made(request)
            except BaseException:
                admitted()
                raise
            admitted.shrink(answer.num_bytes)  # what was on the way to it is the cache's now, or gone
            self._internal_errors = 0
            self._counters.add("answers")
            self._counters.add("bytes_out", answer.num_bytes)
            return Lease(answer, admitted)

    def status(self, client: str = "") -> Status:
        """Costs nothing. `client`: who asks, for transports that know; it counts as a sign of life."""
        if client:
            self._admission.refresh(client)
        draining = self._draining.is_set()
        ready = not draining and self._internal_errors < MAX_INTERNAL_ERRORS
        return Status(
            instance=self.instance, ready=ready, draining=draining, in_flight=self._admission.in_flight,
            clients=self._admission.num_clients, endpoints=self.options.endpoints,
        )  # fmt: skip

    def counters(self) -> dict[str, float]:
        """What was counted since the start, and what is held now: `in_flight`, `in_flight_bytes`, `clients`, `draining`, `cache_bytes`."""
        clients = self._admission.num_clients  # first: it may forget some
        return {
            **self._counters.snapshot(),
            "clients": float(clients),
            "in_flight": float(self._admission.in_flight),
            "in_flight_bytes": float(self._admission.num_bytes),
            "cache_bytes": float(self.producer.cache_bytes),
            "draining": float(self._draining.is_set()),
        }

    def drain(self) -> None:
        """Refuse new requests from now on; running ones end."""
        self._draining.set()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether all answers were made and sent (their leases released), within the time."""
        return self._admission.wait_idle(timeout_s)

    def close(self) -> None:
        """Refuse what comes, and end the workers; answers that are being decoded fail."""
        self.drain()
        self.producer.close()

    def _checked_bytes(self, request: GetBatch) -> int:
        """What to hold free for the answer and the work on it, of a good request. Raises FeedError: bad_request or mismatch."""
        check_stream(request, self.producer.pairs, self.options.limits)
        if request.plan != self._plan(request.layout):
            raise FeedError("mismatch", f"plan: the request has {request.plan}, this server has another for that layout; say Hello again")
        check_start(request)
        self._check_layout(request.layout, request.payload)
        num_bytes = self.producer.answer_bytes(request)
        most = self.options.limits.max_answer_bytes
        if num_bytes > most:
            raise FeedError(
                "bad_request",
                f"an answer of up to {num_bytes} bytes; this server sends at most {most}: ask for fewer pairs or images at once",
            )
        return num_bytes + self.producer.work_bytes(request)

    def _made(self, request: GetBatch) -> Answer:
        try:
            return self.producer.answer(request)
        except FeedError:
            raise
        except (SampleError, ShardError) as err:
            # An error of augmentation is ours; everything else is this host's data, and another server's may be whole.
            is_ours = isinstance(err, SampleError) and err.kind == "transform"
            raise FeedError("internal" if is_ours else "data", str(err)) from err
        except DecodeError as err:
            raise FeedError("internal", str(err)) from err
        except (RuntimeError, ValueError, OSError) as err:
            # Of the device (out of memory), the file system, or a bug: the client learns that it happened, the log where.
            log.exception("answering position %d for pairs %s", request.start, request.pairs)
            raise FeedError("internal", f"{type(err).__name__}: {err}") from err

    def _check_layout(self, layout: BatchLayout, payload: Payload) -> None:
        try:
            self.producer.check_layout(layout, payload)
        except ValueError as err:
            raise FeedError("bad_request", f"layout: {err}") from None

    def _plan_of(self, layout: BatchLayout) -> str:
        return plan_digest(self._fingerprints, layout)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._counters.add("requests")
        try:
            yield
        except FeedError as err:
            self._counters.add(f"errors_{err.code}")
            self._internal_errors += err.code == "internal"
            raise
        except Exception:  # the transport makes an internal error of it
            self._internal_errors += 1
            raise

    def _refuse_draining(self) -> None:
        if self._draining.is_set():
            raise FeedError("draining", "this server is about to stop", endpoints=self.options.endpoints)

    def _same_instance(self, instance: str) -> None:
        if instance != self.instance:
            raise FeedError("mismatch", f"instance: the request is for {instance}, this server is {self.instance}; say Hello again")

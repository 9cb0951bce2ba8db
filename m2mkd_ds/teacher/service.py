"""A teacher server without a transport: greets, answers, limits and drains. Transports (flight_server.py, shm_server.py) call it.

Safe to call from several threads: every transport brings its own.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from m2mkd_ds.teacher.handshake import check_hello, golden_answer, plan_digest
from m2mkd_ds.teacher.produce import Producer
from m2mkd_ds.teacher.wire import PROTOCOL_VERSION, Answer, FeedError, GetBatch, Golden, Hello, Limits, Status, Welcome


@dataclass(frozen=True)
class ServiceOptions:
    """What an operator grants."""

    limits: Limits
    max_bytes: int
    """Of all answers that are being made or sent; more is refused with retry_later."""
    endpoints: tuple[str, ...] = ()
    """Other servers, named to clients while this one drains."""


class TeacherService:
    """One running server's answers."""

    def __init__(self, producer: Producer, fingerprints: Mapping[str, str], options: ServiceOptions) -> None:
        self.producer, self.options = producer, options
        self.instance = secrets.token_hex(16)
        self._fingerprints = dict(fingerprints)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._draining = False

    def hello(self, hello: Hello) -> Welcome:
        """Raises FeedError(mismatch) naming the field and both values."""
        self._refuse_draining()
        check_hello(hello, self._fingerprints, self.options.limits)
        return Welcome(
            protocol=PROTOCOL_VERSION, instance=self.instance, plan=plan_digest(self._fingerprints, hello.layout),
            fingerprints=self._fingerprints, limits=self.options.limits,
        )  # fmt: skip

    def golden(self, request: Golden) -> Answer:
        """Outputs for the synthetic images."""
        self._same_instance(request.instance)
        return golden_answer(self.producer.parts, request)

    def get(self, request: GetBatch) -> Answer:
        """One micro-batch. Raises FeedError."""
        self._refuse_draining()
        self._same_instance(request.instance)
        if request.plan != plan_digest(self._fingerprints, request.layout):
            raise FeedError("mismatch", f"plan: the request has {request.plan}, this server has another for that layout; say Hello again")
        with self._lock:
            self._in_flight += 1
        try:
            return self.producer.answer(request)
        finally:
            with self._lock:
                self._in_flight -= 1

    def status(self) -> Status:
        """Costs nothing."""
        return Status(
            instance=self.instance, ready=not self._draining, draining=self._draining, in_flight=self._in_flight, clients=0,
            endpoints=self.options.endpoints,
        )  # fmt: skip

    def drain(self) -> None:
        """Refuse new requests from now on; running ones end."""
        self._draining = True

    def close(self) -> None:
        """End workers."""
        self.producer.close()

    def _refuse_draining(self) -> None:
        if self._draining:
            raise FeedError("draining", "this server is about to stop", endpoints=self.options.endpoints)

    def _same_instance(self, instance: str) -> None:
        if instance != self.instance:
            raise FeedError("mismatch", f"instance: the request is for {instance}, this server is {self.instance}; say Hello again")

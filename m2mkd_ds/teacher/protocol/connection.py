"""A trainer's link to one server, whatever the transport, and the one without any: a service in the same process."""

from __future__ import annotations

from typing import Protocol

from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.packing import pack, unpack
from m2mkd_ds.teacher.protocol.wire import Answer, GetBatch, Golden, Hello, LinkError, Status, Welcome
from m2mkd_ds.teacher.server.service import TeacherService


class Connection(Protocol):
    """Calls block, and may be made from several threads at once. Each ends within `deadline_s`.

    All raise FeedError when the server refuses, LinkError when the way to it fails (nobody there, late, damaged answer, closed).
    """

    endpoint: str
    carrier: str
    """How it travels, for the log: mutual TLS, TLS, plain TCP, shared memory."""

    def hello(self, hello: Hello, deadline_s: float) -> Welcome:
        """Must come first; the welcome's limits hold for the calls after it."""
        ...

    def golden(self, request: Golden, deadline_s: float) -> Answer:
        """Outputs for the synthetic images."""
        ...

    def get(self, request: GetBatch, deadline_s: float, accept: codec.Accept | None = None) -> Answer:
        """One micro-batch, checksums compared. The caller compares the head with what it asked: best by `accept`, before there is room
        for the tensors; whatever LinkError that raises comes out of this call with the endpoint in front."""
        ...

    def status(self, deadline_s: float) -> Status:
        """How the server is; also the heartbeat."""
        ...

    def close(self) -> None:
        """Calls under way end with LinkError(closed)."""
        ...


class LocalConnection:
    """Talks to a service in this process, by packed messages and encoded frames as over a network."""

    def __init__(self, service: TeacherService, endpoint: str = "local") -> None:
        self.endpoint, self.carrier, self._service = endpoint, "calls in this process", service
        self._closed = False

    def hello(self, hello: Hello, deadline_s: float) -> Welcome:
        self._check_open()
        return unpack(Welcome, pack(self._service.hello(unpack(Hello, pack(hello)))))

    def golden(self, request: Golden, deadline_s: float) -> Answer:
        self._check_open()
        return self._decoded(self._service.golden(unpack(Golden, pack(request))))

    def get(self, request: GetBatch, deadline_s: float, accept: codec.Accept | None = None) -> Answer:
        self._check_open()
        return self._decoded(self._service.get(unpack(GetBatch, pack(request))), accept)

    def status(self, deadline_s: float) -> Status:
        self._check_open()
        return unpack(Status, pack(self._service.status()))

    def close(self) -> None:
        self._closed = True

    def _decoded(self, answer: Answer, accept: codec.Accept | None = None) -> Answer:
        parts = list(codec.encode(answer).parts())
        try:
            return codec.read(parts, max_bytes=self._service.options.limits.max_answer_bytes, accept=accept)
        except LinkError as err:
            raise LinkError(err.fault, f"{self.endpoint}: {err}") from None

    def _check_open(self) -> None:
        if self._closed:
            raise LinkError("closed", f"{self.endpoint}: this link was closed")

"""Who may have how much at once: a bound per client, and one on the bytes of all answers that are being made or sent.

An answer's bytes count from before it is made until whoever sends it lets go of its `Lease`. Nothing waits here: what does not fit is
refused with retry_later, so a client that does not read holds at most its own share. A client that is silent for several heartbeats
is forgotten once nothing is in flight for it: else its share would begin anew while the memory of the old one is still in use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from m2mkd_ds.teacher.protocol.wire import FeedError, Limits
from m2mkd_ds.teacher.server.counters import Counters

SILENT_HEARTBEATS = 4
"""A client that says nothing for longer is forgotten."""
MAX_CLIENTS = 4096
_MIN_RETRY_S, _MAX_RETRY_S = 0.05, 5.0

_Held = TypeVar("_Held")


class Lease(Generic[_Held]):
    """Something admitted, until `release`; also a context manager. Letting go twice is harmless."""

    def __init__(self, answer: _Held, release: Callable[[], None]) -> None:
        self.answer = answer
        self._release: Callable[[], None] | None = release
        self._lock = threading.Lock()

    def release(self) -> None:
        """The bytes have been sent, or never will be."""
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> _Held:
        return self.answer

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


@dataclass(frozen=True)
class Caller:
    """Who greets, as its transport sees it."""

    host: str = "this process"
    is_connected: Callable[[], bool] = lambda: True
    """Whether any connection of it is open."""


@dataclass
class _Client:
    last_heard: float
    in_flight: int = 0
    caller: Caller = Caller()


class Place:
    """What was admitted; calling it gives it back, once."""

    def __init__(self, admission: Admission, client: _Client, num_bytes: int, began: float) -> None:
        self._admission, self._client, self._bytes, self._began = admission, client, num_bytes, began

    def shrink(self, num_bytes: int) -> None:
        """The answer is made, and needs no more than so many bytes from now on."""
        self._admission._shrink(self._bytes - num_bytes)
        self._bytes = num_bytes

    def __call__(self) -> None:
        self._admission._give_back(self._client, self._bytes, self._began)


class Admission:
    """Keeps count. Safe from several threads; a call takes microseconds."""

    def __init__(self, limits: Limits, max_bytes: int, counters: Counters, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._max_bytes, self._counters, self._clock = limits, max_bytes, counters, clock
        self._changed = threading.Condition()
        self._clients: dict[str, _Client] = {}
        self._in_flight, self._bytes = 0, 0
        self._mean_s = _MIN_RETRY_S
        """Of making and sending one answer, lately."""

    @property
    def in_flight(self) -> int:
        """Answers being made or sent."""
        return self._in_flight

    @property
    def num_bytes(self) -> int:
        """Of these."""
        return self._bytes

    @property
    def num_clients(self) -> int:
        """Heard of lately."""
        with self._changed:
            self._forget_silent()
            return len(self._clients)

    def heard(self, name: str, caller: Caller = Caller()) -> bool:
        """A client greets; whether it is a new one. Raises FeedError(retry_later) for one too many."""
        with self._changed:
            self._forget_silent()
            is_new = name not in self._clients
            self._client(name).caller = caller
            return is_new

    def refresh(self, name: str) -> None:
        """A sign of life of a client that is known; of another one it means nothing."""
        with self._changed:
            if name in self._clients:
                self._client(name)

    def admit(self, name: str | None, num_bytes: int) -> Place:
        """What gives back the place. None: of no client, so the bytes alone are counted.

        Raises FeedError: bad_request for what never fits, retry_later for what does not fit now.
        """
        if num_bytes > self._max_bytes:
            raise FeedError(
                "bad_request",
                f"an answer that takes {num_bytes} bytes; this server holds at most {self._max_bytes} of all answers: ask for less",
            )
        with self._changed:
            client = _Client(self._clock()) if name is None else self._client(name)
            if client.in_flight >= self._limits.max_in_flight:
                raise self._later(f"this client has {client.in_flight} answers in flight; {self._limits.max_in_flight} are allowed")
            if self._bytes + num_bytes > self._max_bytes:
                raise self._later(f"answers of {self._bytes} bytes are in flight; {num_bytes} more would be above {self._max_bytes}")
            client.in_flight += 1
            self._in_flight += 1
            self._bytes += num_bytes
        return Place(self, client, num_bytes, self._clock())

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether nothing is in flight, within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, timeout_s)

    def _shrink(self, num_bytes: int) -> None:
        with self._changed:
            self._bytes -= num_bytes

    def _give_back(self, client: _Client, num_bytes: int, began: float) -> None:
        with self._changed:
            client.in_flight -= 1
            client.last_heard = self._clock()
            self._in_flight -= 1
            self._bytes -= num_bytes
            self._mean_s += 0.1 * (self._clock() - began - self._mean_s)
            self._changed.notify_all()

    def _client(self, name: str) -> _Client:
        self._forget_silent()
        client = self._clients.get(name)
        if client is None:
            if len(self._clients) >= MAX_CLIENTS:
                raise self._later(f"{MAX_CLIENTS} clients are here already")
            client = self._clients[name] = _Client(self._clock())
        client.last_heard = self._clock()
        return client

    def _forget_silent(self) -> None:
        latest = self._clock() - SILENT_HEARTBEATS * self._limits.heartbeat_s
        for name in [name for name, client in self._clients.items() if not client.in_flight and client.last_heard < latest]:
            # Who has hung up meanwhile was not put out.
            self._counters.add("evicted_clients" if self._clients.pop(name).caller.is_connected() else "left_clients")

    def _later(self, why: str) -> FeedError:
        return FeedError("retry_later", why, retry_after_s=min(max(self._mean_s, _MIN_RETRY_S), _MAX_RETRY_S))

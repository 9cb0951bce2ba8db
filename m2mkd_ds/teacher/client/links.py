"""One teacher server as a trainer sees it: a greeted connection, or none and when to try again; and what is counted on the way."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

from m2mkd_ds.teacher.protocol.codec import Accept
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, Welcome


class TeacherLostError(RuntimeError):
    """No server answers, for as long as the run's settings allow; the message gives the cause for each."""

    exit_code = 1


class TeacherRefusedError(RuntimeError):
    """A server's refusal that asking again or elsewhere would not mend; the message is the server's sentence."""

    exit_code = 2


class StoppedError(RuntimeError):
    """The feed was closed while this was under way."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How patient the machinery is, in seconds where nothing else is said."""

    first_pause_s: float = 0.25
    """Before a server that failed is tried again; doubles with every further failure."""
    longest_pause_s: float = 15.0
    drained_pause_s: float = 5.0
    """Before a server that drains is asked whether it serves again."""
    told_s: float = 15.0
    """Between two lines about servers that a trainer stands still for."""
    refused_pause_s: float = 60.0
    """Before a server that refuses the run, while others serve it, is greeted again."""
    poll_s: float = 1.0
    """Between two looks at a file of endpoints."""
    close_s: float = 5.0
    """How long closing may take, and how much longer than `patience_s` a connection may keep a call that should have ended."""
    misses: int = 3
    """Heartbeats that a server may leave unanswered."""
    spoiled: int = 3
    """Damaged or wrong answers in a row after which a connection is made anew."""


class Counts:
    """Numbers since they were last taken, added to by several threads."""

    NAMES = ("bytes_in", "retries", "failovers", "duplicates", "corrupt")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(self.NAMES, 0.0)

    def add(self, name: str, amount: float = 1) -> None:
        """Add to one of NAMES."""
        with self._lock:
            self._counts[name] += amount

    def take(self) -> dict[str, float]:
        """All of them; they begin anew at 0."""
        with self._lock:
            taken, self._counts = self._counts, dict.fromkeys(self.NAMES, 0.0)
        return taken


class Session:
    """A greeted connection, and how many requests its server grants at a time."""

    def __init__(self, connection: Connection, welcome: Welcome) -> None:
        self.connection, self.welcome = connection, welcome
        self.due_at = 0.0
        """When the next heartbeat is due (time.monotonic)."""
        self.misses = 0
        self._credits = threading.BoundedSemaphore(welcome.limits.max_in_flight)
        self._lock = threading.Lock()
        self._calls, self._retired, self._closed = 0, False, False
        self.heard()

    def get(self, request: GetBatch, deadline_s: float, accept: Accept) -> Answer:
        """One micro-batch, once the server's limit on requests allows it. Raises FeedError, LinkError."""
        until = time.monotonic() + deadline_s
        with self._lock:
            self._calls += 1
        try:
            if not self._credits.acquire(timeout=deadline_s):
                raise FeedError("retry_later", f"its limit of {self.welcome.limits.max_in_flight} requests at a time is used up")
            try:
                answer = self.connection.get(request, max(0.01, until - time.monotonic()), accept)
            finally:
                self._credits.release()
            self.heard()
            return answer
        finally:
            with self._lock:
                self._calls -= 1
            self._close_if_unused()

    def heard(self) -> None:
        """The server lives: no heartbeat is due for a while."""
        self.misses = 0
        self.due_at = time.monotonic() + self.welcome.limits.heartbeat_s

    def retire(self) -> None:
        """Close once the calls under way have ended."""
        with self._lock:
            self._retired = True
        self._close_if_unused()

    def close(self) -> None:
        """Calls under way end with LinkError(closed)."""
        with self._lock:
            is_first, self._closed = not self._closed, True
        if is_first:
            self.connection.close()

    def _close_if_unused(self) -> None:
        with self._lock:
            is_unused = self._retired and not self._calls
        if is_unused:
            self.close()


@dataclass(eq=False)
class Link:
    """One endpoint. Without a session it is to be greeted at `not_before`; with one, asked again from then on (time.monotonic)."""

    endpoint: str
    session: Session | None = None
    not_before: float = 0.0
    failures: int = 0
    """In a row, without an answer between them."""
    spoiled: int = 0
    """Damaged or wrong answers in a row."""
    gone: str = ""
    """Why the last greeting failed, or that the server drains; empty where it may be asked, or was not tried since."""
    trouble: str = ""
    """What went wrong last, for messages."""
    contradicted: tuple[str, str] = ("", "")
    """Instance that called a request a mismatch, and its sentence: a restarted server has another instance, a wrong one the same."""
    refused: str = ""
    """Why it cannot serve the run, as far as is known: until it is greeted with success, or gone."""
    told: str = ""
    """The last such reason that was logged."""
    is_draining: bool = False
    is_tended: bool = False
    """Whether a thread greets it or sends it a heartbeat now."""
    random: random.Random = field(default_factory=random.Random)
    """Its own generator: pauses must not shift anybody's random numbers."""

    @property
    def due_at(self) -> float:
        """When it has to be greeted, or be sent a heartbeat."""
        return self.not_before if self.session is None else self.session.due_at

    def pause(self, pace: Pace, at_least_s: float = 0.0) -> None:
        """Leave it alone for a while, longer with every failure; `at_least_s`: what the server asked for."""
        grown_s = min(pace.longest_pause_s, pace.first_pause_s * 2.0 ** min(self.failures - 1, 30))
        jitter = self.random.uniform(0.5, 1.0)
        self.not_before = time.monotonic() + max(grown_s * jitter if self.failures else 0.0, at_least_s * (1.5 - jitter / 2))

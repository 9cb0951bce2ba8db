"""Trying again, with growing random pauses, until a deadline: for everything that comes over a network."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.shard_files import IoCounts
from m2mkd_ds.logs import logger

T = TypeVar("T")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
PROGRESS_BYTES = 1 << 20
"""A download gets a new deadline whenever it is so many bytes further: slow lines are fine, a trickle is not."""


class TemporaryFault(Exception):  # noqa: N818
    """What may be gone on the next try. The text must be free of secrets."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopped(Exception):  # noqa: N818
    """The work was called off."""


class IoCounter:
    """Counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"hits": 0, "misses": 0, "bytes_fetched": 0, "retries": 0}

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one field of IoCounts."""
        with self._lock:
            self._counts[name] += amount

    def read(self) -> IoCounts:
        """The counts now."""
        with self._lock:
            return IoCounts(**self._counts)


class Retrier:
    """Bounded retries. After it has given up, each call gets one try, until one succeeds: a dead server costs its deadline once."""

    def __init__(self, deadline_s: float, counter: IoCounter | None = None, stop: threading.Event | None = None) -> None:
        self.deadline_s = deadline_s
        self.counter = counter or IoCounter()
        self.stop = stop or threading.Event()
        self.gave_up = False
        # Its own generator: pauses must not shift anybody's random numbers.
        self.random = random.Random()

    def call(self, what: str, attempt: Callable[[float], T]) -> T:
        """The result of `attempt(seconds left)`, which raises TemporaryFault for another try.

        Raises SampleError(kind="io") at the deadline, Stopped when `stop` is set meanwhile.
        """
        patience = Patience(self, what)
        while True:
            try:
                result = attempt(patience.left_s())
            except TemporaryFault as fault:
                patience.pause(fault)
            else:
                self.gave_up = False
                return result


class Patience:
    """The deadline of one call."""

    def __init__(self, retrier: Retrier, what: str) -> None:
        self._retrier, self._what = retrier, what
        self._tries = 0
        self._began = time.monotonic()

    def left_s(self) -> float:
        """Seconds until the deadline, at least a little: a try needs some time."""
        return max(0.1, self._began + self._retrier.deadline_s - time.monotonic())

    def progress(self) -> None:
        """Begin anew: something arrived."""
        self._tries = 0
        self._began = time.monotonic()
        self._retrier.gave_up = False

    def check(self) -> None:
        """Raise Stopped when called off, TemporaryFault when the deadline passed without progress."""
        if self._retrier.stop.is_set():
            raise Stopped
        if time.monotonic() - self._began > self._retrier.deadline_s:
            raise TemporaryFault(f"fewer than {PROGRESS_BYTES} bytes came in {self._retrier.deadline_s:g} s")

    def pause(self, fault: TemporaryFault) -> None:
        """Sleep before the next try. Raises SampleError when the time is up, Stopped when called off."""
        retrier = self._retrier
        self._tries += 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._tries - 1)) * retrier.random.uniform(0.5, 1.0)
        pause_s = max(pause_s, fault.retry_after_s)
        elapsed_s = time.monotonic() - self._began
        if retrier.gave_up or elapsed_s + pause_s > retrier.deadline_s:
            known = "; tried once only, because the call before failed for good" if retrier.gave_up else ""
            asked = f"; the server asks for a pause of {fault.retry_after_s:g} s" if fault.retry_after_s else ""
            retrier.gave_up = True
            raise SampleError(
                f"{self._what}: {fault}; given up after {self._tries} tries in {elapsed_s:.1f} s "
                f"(data.io_deadline_s is {retrier.deadline_s:g}){asked}{known}",
                "io",
            ) from None
        retrier.counter.add("retries")
        logger.warning("%s: %s; trying again in %.1f s (try %d)", self._what, fault, pause_s, self._tries + 1)
        if retrier.stop.wait(pause_s):
            raise Stopped

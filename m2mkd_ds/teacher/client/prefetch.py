"""Work that is done ahead of its use, by threads, and handed out in order: at most `depth` results are under way or waiting.

A free place is the only credit there is, so a consumer that is slow stops the threads, and nothing piles up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Place(Generic[T]):
    """One piece of work. `needed_at`: since when the consumer waits for this very piece (time.monotonic); None: it does not."""

    number: int
    needed_at: float | None = None
    done: bool = False
    result: T | None = None
    error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Results of `work(place)` for every number of `numbers`, in order.

    `on_need` is called whenever the consumer begins to wait. An error of `work` reaches the consumer when that number's turn comes;
    after one, no further number is begun.
    """

    def __init__(
        self, numbers: range, work: Callable[[Place[T]], T], *, depth: int, name: str, on_need: Callable[[], None] = lambda: None
    ) -> None:
        self._numbers, self._work, self._depth, self._on_need = numbers, work, depth, on_need
        self._changed = threading.Condition()
        self._places: deque[Place[T]] = deque()
        """Begun and not handed out, in order."""
        self._begun = 0
        self._stopping = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(depth)]
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float) -> tuple[T, float]:
        """The next result, and the seconds that it was waited for. One consumer only.

        Raises what `work` raised, TimeoutError when `timeout_s` pass, RuntimeError after `stop` or past the last number.
        """
        began = time.monotonic()
        with self._changed:
            is_ready = bool(self._places) and self._places[0].done
        if not is_ready:
            self._wait(began, timeout_s)
        with self._changed:
            place = self._places.popleft()
            self._changed.notify_all()
        if place.error is not None:
            raise place.error
        assert place.result is not None
        return place.result, 0.0 if is_ready else time.monotonic() - began

    def num_under_way(self) -> int:
        """Pieces that are being worked on now."""
        with self._changed:
            return sum(not place.done for place in self._places)

    def stop(self) -> None:
        """Begin nothing more, and let a waiting consumer go. `work` that is under way has to be ended by its owner."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> int:
        """Wait for the threads; how many are still there after `timeout_s`."""
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _wait(self, began: float, timeout_s: float) -> None:
        """Until the first place is done. The time counts as needed from `began` on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._places or self._is_over, timeout_s):
                raise TimeoutError
            if not self._places:
                raise RuntimeError("nothing is left to hand out: it was stopped, it ended, or an error came before")
            place = self._places[0]
            place.needed_at = began
        self._on_need()
        with self._changed:
            if not self._changed.wait_for(lambda: place.done or self._stopping, began + timeout_s - time.monotonic()):
                raise TimeoutError
            if not place.done:
                raise RuntimeError("stopped while a result was waited for")

    @property
    def _is_over(self) -> bool:
        return self._stopping or self._begun >= len(self._numbers)

    def _run(self) -> None:
        """A thread: take a free place, work, put the result there."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or len(self._places) < self._depth)
                if self._is_over:
                    return
                place: Place[T] = Place(self._numbers[self._begun])
                self._begun += 1
                self._places.append(place)
                self._changed.notify_all()
            try:
                place.result = self._work(place)
            except BaseException as err:  # noqa: BLE001  # raised again by `take`, in order
                place.error = err
            with self._changed:
                place.done = True
                if place.error is not None:
                    self._begun = len(self._numbers)
                self._changed.notify_all()
            del place  # while this thread waits, it must not keep the memory of a result that was handed out

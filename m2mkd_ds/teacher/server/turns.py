"""A lock that is had in the order of asking: nobody waits for more than one turn of each who asked before."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """`with turns:` waits for its turn. `threading.Lock` gives no order: who lets go of it and asks again at once usually has it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._waiting:
                # Handed over, not let go of: nobody can come in between.
                self._waiting.popleft().set()
            else:
                self._taken = False

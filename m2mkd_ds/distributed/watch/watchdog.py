"""The watchdog of a rank: heartbeats, and the end of a rank whose main thread stays in one section for too long.

    thread `beat`    writes heartbeats/rank-<r>.json              thread `watch`   compares the main thread's section with its limit

Two threads, because writing may block for ever where a file system hangs, and `watch` must not. Past half of a limit an `Observer`
(suspects.py) begins to look at the other ranks; past the whole, the rank dumps its threads, says in one line who holds it up, leaves its
record and ends with HANG_CODE, so that nothing waits for ever. Code that holds Python's lock for ever stops both; then it is the silence
that the other ranks notice.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from m2mkd_ds.distributed.watch.activity import Snapshot, snapshot
from m2mkd_ds.distributed.watch.records import beat_of, heartbeat_file, stack_file, write_record
from m2mkd_ds.distributed.watch.suspects import LOOK_S, SILENT_BEATS, Observer, shared_look_s

HANG_CODE = 76
"""Exit code of a rank that its watchdog ended."""
BEREFT_CODE = 1
"""Exit code of a rank that was asked to stop and cannot, because another one is dead."""

_TICK_S = 0.25
_FROZEN_S = 3.0
"""A tick that comes so late means that this process itself was stopped (SIGSTOP, a suspended job), and its main thread with it."""
_BEREFT_S = 5.0
"""After a request to stop: how long the main thread may stand still when another rank is known to be dead. Launchers ask the others to
stop when one has failed; where collectives do not notice (NCCL), nobody else would end this one before they lose patience."""
_LAST_WORDS_S = 10.0
"""How long writing the last records may take, on a file system that may hang."""


@dataclass(frozen=True)
class Watched:
    """Who is watched, where the records go, and what is told when it hangs."""

    folder: Path
    launch: str
    rank: int
    size: int
    limits_s: Mapping[str, float]
    """By `activity.Limit`; 0 or absent: none."""
    heartbeat_s: float
    on_end: Callable[[str, Snapshot, int], None]
    """(why, where the main thread is, exit code): leaves the rank's record; in a thread, cut off after some seconds."""
    stop_asked: Callable[[], bool] = lambda: False
    """Whether the run was asked to stop."""


class Watchdog:
    """Runs from `start` to `stop`; one a process at a time."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._stop = threading.Event()
        self._excused = 0.0
        """time.monotonic() up to which the main thread's standstill is no fault of its own."""
        self._threads = [threading.Thread(target=work, name=f"m2mkd-{work.__name__}", daemon=True) for work in (self.beat, self.watch)]

    def start(self) -> None:
        """Write the first heartbeat, raising OSError where that cannot be, and begin to watch."""
        watched = self._watched
        write_record(heartbeat_file(watched.folder, watched.rank), beat_of(watched.launch, watched.rank, 0, snapshot()))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads; the last heartbeat stays."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_LAST_WORDS_S)

    def beat(self) -> None:
        """A heartbeat now and then. A full disk costs heartbeats, not the run."""
        watched, number = self._watched, 0
        while not self._stop.wait(watched.heartbeat_s):
            number += 1
            try:
                write_record(heartbeat_file(watched.folder, watched.rank), beat_of(watched.launch, watched.rank, number, snapshot()))
            except OSError:
                continue

    def watch(self) -> None:
        """Compare, and end the process when it is time."""
        observer: Observer | None = None
        last = time.monotonic()
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            if now - last > _FROZEN_S:
                self._excused = now
            last = now
            here = snapshot()
            limit_s = self._watched.limits_s.get(here.limit, 0.0)
            idle_s = now - max(here.changed, self._excused)
            margin_s = min(limit_s / 2, max(limit_s - 4 * SILENT_BEATS * self._watched.heartbeat_s, 0.0))
            is_suspicious = (limit_s > 0 and idle_s > margin_s) or self._watched.stop_asked()
            if is_suspicious and observer is None:
                watched = self._watched
                # After a stop for as long as the save takes; before a limit for some seconds, and the word is to be in time.
                look_s = shared_look_s(watched.size) if watched.stop_asked() else LOOK_S
                observer = Observer(watched.folder, watched.launch, watched.rank, watched.size, watched.heartbeat_s, look_s)
            elif not is_suspicious and observer is not None:
                observer.close()
                observer = None
            if observer is None:
                continue
            if 0 < limit_s < idle_s and observer.has_looked_long_enough:
                self._hung(here, idle_s, limit_s, observer)
            if self._watched.stop_asked() and idle_s > _BEREFT_S and observer.is_certain:
                self._end(f"{observer.suspect(here)}; this rank leaves {here.describe()}", here, BEREFT_CODE)

    def _hung(self, here: Snapshot, idle_s: float, limit_s: float, observer: Observer) -> None:
        verb = "waits in" if here.is_collective else "stays in"
        waits = f"this rank ({self._watched.rank}) {verb} {here.describe()} since {idle_s:.0f} s"
        # A rank that nobody else can hold up is its own suspect, unless another one is missing altogether.
        other = observer.suspect(here) if here.may_wait and self._watched.size > 1 else observer.missing()
        text = f"{other}; {waits}" if other else waits
        field = "the longer of watch.start_s and watch.step_s" if here.limit == "first" else f"watch.{here.limit}_s"
        text += f" (limit: {field}={limit_s:g})"
        self._end(text, here, HANG_CODE)

    def _end(self, text: str, here: Snapshot, code: int) -> None:
        # First on the screen: file systems may hang. Not by the logger, whose lock the main thread may hold.
        what = f"hung: {text}; stacks: {stack_file(self._watched.folder, self._watched.rank)}" if code == HANG_CODE else text
        say(f"m2mkd_ds: {what}")
        words = threading.Thread(target=self._last_words, args=(text, here, code), daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)
        os._exit(code)

    def _last_words(self, text: str, here: Snapshot, code: int) -> None:
        self._watched.on_end(text, here, code)
        file = stack_file(self._watched.folder, self._watched.rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as out:
            faulthandler.dump_traceback(out, all_threads=True)


def say(line: str) -> None:
    """One line on stderr, straight to the descriptor; a reader that has gone is no reason to fail."""
    try:
        os.write(2, (line + "\n").encode())
    except OSError:
        return

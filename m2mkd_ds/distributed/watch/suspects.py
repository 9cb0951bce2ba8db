"""Who holds the others up: from the records of the other ranks, watched for some seconds.

In this order: a rank that failed with an error of its own; one whose process has gone; one that is silent; one that never spoke; one
that stays where no other rank can hold it up; one that waits in another place than this one.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from m2mkd_ds.distributed.watch.activity import Snapshot
from m2mkd_ds.distributed.watch.records import Failure, Heartbeat, read_failures, read_heartbeats

SILENT_BEATS = 2.2
"""A rank is silent after so many heartbeat intervals without a new heartbeat, by the clock of the one who looks."""
LOOK_S = 0.25
"""Between two looks of an observer that is alone, or is needed for seconds only."""
_READS_PER_S = 4000.0
"""Heartbeats that all ranks together may read in a second, while they look for long."""


def shared_look_s(size: int) -> float:
    """Between two looks of each of `size` ranks that all look at all.

    After a stop every rank does so for as long as the save takes, and a look reads a file for every rank, of the disk that all share and
    save to. So the interval grows with the square of the ranks, from 32 on, and what the job reads does not: 1 s for 64 ranks, 16 s for
    256. A process of this host that has gone is noticed at once all the same, without its file, from the first look on.
    """
    return max(LOOK_S, size**2 / _READS_PER_S)


class Observer:
    """Reads the records of the others again and again, in a thread of its own: reading may block for ever where a file system hangs."""

    def __init__(self, folder: Path, launch: str, rank: int, size: int, heartbeat_s: float, look_s: float = LOOK_S) -> None:
        self._folder, self._launch, self._rank, self._size, self._look_s = folder, launch, rank, size, look_s
        # Between two looks a rank is not silent, but unseen.
        self._silence_s = SILENT_BEATS * heartbeat_s + look_s - LOOK_S
        self._began = time.monotonic()
        # All ranks are asked to stop at once: those that look seldom take turns from the first look on.
        self._first_s = (look_s - LOOK_S) * max(rank, 0) / max(size, 1)
        self._beats: dict[int, Heartbeat] = {}
        self._changed: dict[int, float] = {}
        self._failures: dict[int, Failure] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="m2mkd-observer", daemon=True)
        self._thread.start()

    @property
    def has_looked_long_enough(self) -> bool:
        """Whether a rank that lives must have been heard of."""
        return time.monotonic() - self._began > self._first_s + self._silence_s + LOOK_S

    @property
    def is_certain(self) -> bool:
        """Whether somebody has failed or gone: no need to look any longer."""
        return bool(self._own_failures()) or any(beat.is_gone for beat in self._others())

    def living(self) -> list[Heartbeat]:
        """Who has not gone and, once it was looked for long enough, is not silent."""
        now = time.monotonic()
        return [beat for beat in self._others() if not beat.is_gone and now - self._changed[beat.rank] <= self._silence_s]

    def suspect(self, mine: Snapshot) -> str:
        """One clause that names the rank which holds the others up, or says that none is known. Reads no file."""
        missing = self.missing()
        if missing:
            return missing
        others = self._others()
        busy = [beat for beat in others if not beat.may_wait]
        if busy:
            longest = max(busy, key=lambda beat: beat.since_s)
            return f"{longest.who} stays in {longest.describes} since {longest.since_s:.0f} s"
        apart = [beat for beat in others if beat.describes != mine.describe()]
        if apart:
            return f"{apart[0].who} waits elsewhere, in {apart[0].describes}: the ranks have come apart"
        return "all ranks are there and wait in the same place: is the network between them down?"

    def missing(self) -> str:
        """One clause that names a rank which failed, has gone, is silent or never spoke; empty when there is none. Reads no file."""
        now = time.monotonic()
        own = self._own_failures()
        if own:
            return describe_failure(own[0])
        others = self._others()
        for beat in others:
            if beat.is_gone:
                return f"{beat.who} (process {beat.pid}) has gone without a word: killed? last seen in {beat.describes}"
        silent = [beat for beat in others if now - self._changed[beat.rank] > self._silence_s]
        if silent:
            longest = min(silent, key=lambda beat: beat.time)
            return f"{longest.who} has not been heard of for {max(time.time() - longest.time, 0):.0f} s; last seen in {longest.describes}"
        mute = [rank for rank in range(self._size) if rank != self._rank and rank not in self._beats]
        if mute:
            return f"rank {mute[0]} has never been heard of in this phase"
        return ""

    def close(self) -> None:
        """Look no more."""
        self._stop.set()

    def _others(self) -> list[Heartbeat]:
        return [beat for rank, beat in sorted(self._beats.items()) if rank != self._rank]

    def _own_failures(self) -> list[Failure]:
        """Of others, with errors of their own, the first one first."""
        failures = [failure for rank, failure in self._failures.items() if rank != self._rank and failure.kind != "peer"]
        return sorted(failures, key=lambda failure: failure.time)

    def _look(self) -> None:
        self._stop.wait(self._first_s)
        while not self._stop.is_set():
            self._failures = read_failures(self._folder, self._launch)
            beats = read_heartbeats(self._folder, self._launch)
            now = time.monotonic()
            for rank, beat in beats.items():
                if rank not in self._beats or self._beats[rank].beat != beat.beat:
                    self._changed[rank] = now
            self._beats = beats
            self._stop.wait(self._look_s)


def describe_failure(failure: Failure) -> str:
    """rank 1 (host node2) failed in `forward` of step 12, pair 0: ValueError: ..."""
    slots = f" (slots {failure.slots})" if failure.slots else ""
    return f"rank {failure.rank} (host {failure.host}) failed in {failure.where}{slots}: {failure.cause}"

"""One save of one checkpoint: who takes part, where its files lie until it is committed, and how long ranks look for each other's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.saves.folders import folder_of

_PAUSE_S = (0.001, 0.05)
"""Between two looks at a folder: the first and the longest."""


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Ranks:
    """Who saves together."""

    rank: int = 0
    size: int = 1
    broadcast: Callable[[Any], Any] = _same
    """The value of rank 0, on every rank; called in `begin` only."""


ALONE = Ranks()
"""One process that has the whole state."""


@dataclass(frozen=True)
class Attempt:
    """One save of one step."""

    root: Path
    step: int
    name: str
    """Different for every save ever made."""
    ranks: Ranks

    @property
    def folder(self) -> Path:
        """Where it will be when it is committed."""
        return folder_of(self.root, self.step)

    @property
    def temp(self) -> Path:
        """Where it is until then."""
        return self.folder.with_name(f"{self.folder.name}.{self.name}.tmp")

    def part(self, rank: int) -> Path:
        """What rank `rank` says of its files."""
        return self.temp / f"part-{rank:05d}.json"


@dataclass
class Deadline:
    """How long to look for what other ranks write. May be shortened from another thread."""

    seconds: float
    granted_s: float = field(init=False)
    """What the last `restart` gave."""
    _end: float = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self, times: int = 1) -> None:
        """Count `times` the seconds from now on."""
        self.granted_s = times * self.seconds
        self._end = time.monotonic() + self.granted_s

    def shorten(self, seconds: float) -> None:
        """Allow `seconds` more at most, from now on; for good."""
        self.seconds = min(self.seconds, seconds)
        self._end = min(self._end, time.monotonic() + seconds)

    def looks(self) -> Iterator[bool]:
        """Once a look, with a pause between two: whether time is up. Never ends by itself."""
        pause_s, longest_s = _PAUSE_S
        while True:
            yield time.monotonic() > self._end
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

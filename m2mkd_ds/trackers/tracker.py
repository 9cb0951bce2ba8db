"""What a tracker is told: a copy of a trainee's metrics, for people who look at curves elsewhere. metrics.jsonl stays the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One trainee's curve."""

    project: str
    """What runs are grouped by: the recipe's name."""
    name: str
    """Run folder and phase, for people."""
    id: str
    """Random; the same when training goes on from a checkpoint."""
    folder: Path
    """Of the phase or pair; a tracker that writes files puts them below it."""
    config: Mapping[str, Any]
    """Of the run, plain data without secrets."""


class Tracker(Protocol):
    """Takes numbers; calls may raise whatever the package behind it raises."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of an optimizer step; steps only grow."""
        ...

    def finish(self) -> None:
        """Flush and close."""
        ...

"""TensorBoard: event files beside metrics.jsonl, by torch's writer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2mkd_ds.trackers.tracker import TrackedRun


class Board:
    """Writes to `tensorboard/` in the trainee's folder. A run that goes on adds a file there."""

    def __init__(self, run: TrackedRun) -> None:
        """Raises ImportError without the package."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """As `Tracker`."""
        self._writer.close()

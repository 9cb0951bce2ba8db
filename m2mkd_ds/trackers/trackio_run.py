"""Trackio: runs in a local database (`trackio show`), or where TRACKIO_SPACE_ID and the like say."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Mapping

from m2mkd_ds.trackers.tracker import TrackedRun


def check() -> None:
    """Raises ImportError without the package."""
    import trackio  # noqa: F401  # whether it is there is all that is asked


class TrackioRun:
    """One run; several may be open in a process."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # It knows a run by its name. In a context of its own: `init` ends the run that it finds open in the present one.
        with _quiet():
            self._run = contextvars.Context().run(
                trackio.init, project=run.project, name=f"{run.name} {run.id}", config=dict(run.config), resume="allow", embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker`."""
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """As `Tracker`."""
        with _quiet():
            self._run.finish()


def _quiet() -> contextlib.AbstractContextManager[object]:
    """What it prints goes to stderr, as our log does: stdout is for results."""
    return contextlib.redirect_stdout(sys.stderr)

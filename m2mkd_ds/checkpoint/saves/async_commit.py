"""The saves of one trainee, one after the other: in the caller's thread, or (`asynchronous`) in a thread of their own.

    save    wait for the save before; `begin` (a small broadcast); copy the state          the training step is blocked for these
            write the copy, commit it                                                      in line, or in the thread
    wait    the end of the save under way, with its error

Both ways run the same code. No collective is called from the thread: it would get between the collectives of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.saves.attempt import Attempt, Deadline, Ranks
from m2mkd_ds.checkpoint.saves.commit import Write, begin, complete, failing_for_all
from m2mkd_ds.checkpoint_config import CheckpointConfig


class Committer:
    """Commits the checkpoints of one trainee below `root`. Every rank makes one and calls the same methods in the same order."""

    def __init__(self, root: Path, ranks: Ranks, config: CheckpointConfig) -> None:
        self.root, self.ranks, self.config = root, ranks, config
        self._deadline = Deadline(config.deadline_s)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def save(self, step: int, copy: Callable[[], Write], record: Mapping[str, Any]) -> None:
        """Save one step; collective. `copy` returns what writes the copy that it has made; the copy must not change until `wait`.

        Raises StoreError when this save (in line) or the one before (asynchronous) failed on any rank, and what `copy` raises.
        """
        self.wait()
        attempt = begin(self.root, step, self.ranks)
        with failing_for_all(attempt):
            write = copy()
        if not self.config.asynchronous:
            self._complete(attempt, write, record)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._complete, attempt, write, record)

    def is_busy(self) -> bool:
        """Whether a save is under way; does not wait."""
        return self._pending is not None and not self._pending.done()

    def has_failed(self) -> bool:
        """Whether this rank knows that the save under way has failed; does not wait. `wait` then raises, on this rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Return when no save is under way. Raises StoreError when this rank knows that the last one failed, or not that it was committed.

        What goes wrong on any rank before the commit, all ranks learn, at the latest by their deadlines. Still they may end differently: a
        rank that does not see the commit in time raises alone, though the checkpoint is there. No collective is made here; training asks
        all ranks before every optimizer step whether one knows of a failure (`loop._agree`).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self, patience_s: float | None = None) -> str:
        """End the thread; returns the error of a save under way, if any. With `patience_s` other ranks are given no longer than that.

        For ways out on which another error is already being raised; elsewhere, `wait` first.
        """
        problem = ""
        pending, self._pending = self._pending, None
        if pending is not None:
            if patience_s is not None:
                self._deadline.shorten(patience_s)
            try:
                pending.result()
            except (OSError, RuntimeError, ValueError) as err:
                problem = str(err)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        return problem

    def _complete(self, attempt: Attempt, write: Write, record: Mapping[str, Any]) -> None:
        complete(attempt, write, record, self.config, self._deadline)

"""What the data room's pools of processes share: how many by default, and that none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import threading

MAX_DEFAULT_WORKERS = 8


def default_workers() -> int:
    """As many as this process may use processors, at most 8: a disk seldom keeps up with more."""
    return max(1, min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS))


def end_with_parent() -> None:
    """Called in a worker: end at once when the parent is gone (killed, say).

    Workers wait for jobs on a pipe that they hold open themselves: without this they would outlive it for ever. What they were writing
    stays under a temporary name.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

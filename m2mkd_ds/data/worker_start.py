"""How a loader's workers start: forked, but from a server that has imported what they need and done nothing else.

The training process itself is never forked: a child of a process that uses threads or CUDA may hang. Spawning is as safe, and
imports torch and timm anew in every worker (5 s of CPU time each); the server imports them once for all loaders of the run.

Whoever stops a job sends its signals to all of its processes. Server and workers do not hear them: the training process needs their
batches until it has saved, and ends them itself.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import signal
import sys
from multiprocessing.context import BaseContext

from m2mkd_ds.data.shards.processes import end_with_parent

PRELOAD = "m2mkd_ds.data.worker_imports"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def worker_context() -> BaseContext:
    """The start method of loader workers. A server that runs already (another library's, say) is used as it is."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # Started here and not by the first worker, because it must inherit blocked signals: it has no place for code of ours. Python's
    # resource tracker first, whose start unblocks them.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(_: int) -> None:
    """DataLoader's worker_init_fn. Its own watch looks at the parent's process id, and the parent of a forked worker is the server."""
    end_with_parent()
    ignore_stop_signals()


def ignore_stop_signals() -> None:
    """In a worker, whose parent ends it. Blocked by the server already, where there is one; another library's server blocks nothing."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

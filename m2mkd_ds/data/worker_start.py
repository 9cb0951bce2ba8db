"""How a loader's workers start: forked, but from a server that has imported what they need and done nothing else.

The training process itself is never forked: a child of a process that uses threads or CUDA may hang. Spawning is as safe, and
imports torch and timm anew in every worker (5 s of CPU time each); the server imports them once for all loaders of the run.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext

from m2mkd_ds.data.shards.processes import end_with_parent

PRELOAD = "m2mkd_ds.data.worker_imports"


def worker_context() -> BaseContext:
    """The start method of loader workers. A server that runs already (another library's, say) is used as it is."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


def start_worker(_: int) -> None:
    """DataLoader's worker_init_fn. Its own watch looks at the parent's process id, and the parent of a forked worker is the server."""
    end_with_parent()

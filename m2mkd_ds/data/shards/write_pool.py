"""Shards written by several processes: whole shards are handed out, so the bytes do not depend on how many there are.

Processes are spawned, never forked: the caller may hold threads and locks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.shards.processes import end_with_parent
from m2mkd_ds.data.shards.shard_task import ShardDone, ShardTask, write_shard

POLL_S = 0.5


def write_all(tasks: Iterable[ShardTask], workers: int, advance: Callable[[int], None]) -> Iterator[ShardDone]:
    """Write the shards of `tasks`, in this process or in `workers` others; they come back in the order in which they are finished.

    `advance` is called here with numbers of samples done. Raises what `write_shard` raises, and ShardError when a worker is killed.
    """
    if workers == 1:
        for task in tasks:
            yield write_shard(task, advance)
        return
    context = multiprocessing.get_context("spawn")
    count, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (count, stop))
    try:
        yield from _finished(pool, iter(tasks), 2 * workers, _Counter(count, advance))
    except BrokenProcessPool as err:
        raise ShardError(
            "a process that wrote shards was killed (out of memory?); finished shards are kept: run the same command again, "
            "with fewer --workers"
        ) from err
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(pool: ProcessPoolExecutor, tasks: Iterator[ShardTask], window: int, counter: _Counter) -> Iterator[ShardDone]:
    """Keep `window` tasks in hand, so that the descriptions of all samples are never copied at once."""
    running: set[Future[ShardDone]] = set()
    while True:
        while len(running) < window and (task := next(tasks, None)) is not None:
            running.add(pool.submit(_work, task))
        if not running:
            return
        done, running = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
        counter.report()
        for future in done:
            yield future.result()


class _Counter:
    """Passes on what the workers have counted since the last time."""

    def __init__(self, count: Any, advance: Callable[[int], None]) -> None:
        self._count, self._advance, self._reported = count, advance, 0

    def report(self) -> None:
        now = self._count.value
        self._advance(now - self._reported)
        self._reported = now


# What a worker process keeps between tasks: the pool's initializer has no other way to hand them on.
_shared: dict[str, Any] = {}


def _start_worker(count: Any, stop: Any) -> None:
    _shared.update(count=count, stop=stop)
    end_with_parent()


def _work(task: ShardTask) -> ShardDone:
    def advance(n: int) -> None:
        if _shared["stop"].is_set():
            raise ShardError("stopped, because another shard failed")
        with _shared["count"].get_lock():
            _shared["count"].value += n

    return write_shard(task, advance)

"""The same work for many shards, in several processes, with progress; results come in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.shards.processes import default_workers, end_with_parent
from m2mkd_ds.logs import Progress

J = TypeVar("J")
R = TypeVar("R")


def map_shards(
    work: Callable[[J], R], jobs: Sequence[J], *, workers: int, what: str, num_bytes: Callable[[R], int], enabled: bool = True
) -> list[R]:
    """`[work(job) for job in jobs]` in `workers` processes (0: one a CPU core, at most 8; 1: in this one).

    `num_bytes`: what a result says about the bytes read, for the shown speed. The first error stops everything and is raised.
    """
    if workers < 0:
        raise ShardError(f"workers is {workers}; give a number of processes, or 0 for one a CPU core")
    count = min(workers or default_workers(), max(len(jobs), 1))
    results: dict[int, R] = {}
    started, read = time.monotonic(), 0
    with Progress(len(jobs), what, enabled=enabled) as bar:
        for number, result in _in_this_process(work, jobs) if count == 1 else _in_processes(work, jobs, count):
            results[number] = result
            read += num_bytes(result)
            bar.advance(note=f"{read / 1e6 / max(time.monotonic() - started, 1e-3):.0f} MB/s")
    return [results[number] for number in range(len(jobs))]


def _in_this_process(work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[tuple[int, R]]:
    for number, job in enumerate(jobs):
        yield number, work(job)


def _in_processes(work: Callable[[J], R], jobs: Sequence[J], count: int) -> Iterator[tuple[int, R]]:
    # Spawned: a forked child of a process that uses threads may hang.
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        numbers = {pool.submit(work, job): number for number, job in enumerate(jobs)}
        for done in as_completed(numbers):
            yield numbers[done], done.result()
    except BrokenProcessPool as err:
        raise ShardError("a worker process was killed (out of memory?); use fewer --workers") from err
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

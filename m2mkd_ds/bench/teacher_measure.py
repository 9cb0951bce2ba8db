"""One pass of one row of `m2mkd bench teacher`: throughput with several requests under way, then the latency of single ones.

CPU time is taken while neither process has anything to do, before and after the first part: what a library does behind the last batch,
such as freeing memory, counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_ds.bench.teacher_batches import Batches
from m2mkd_ds.bench.teacher_floors import Client
from m2mkd_ds.bench.teacher_host import Host
from m2mkd_ds.bench.teacher_options import TeacherBench

IDLE_S = 0.02
"""A process that used almost no CPU time for so long has nothing to do."""
SETTLE_S = 2.0


@dataclass(frozen=True)
class Moved:
    """What one pass took."""

    batches: int
    num_bytes: int
    """Of one batch."""
    wall_s: float
    client_cpu_s: float
    server_cpu_s: float
    latencies_s: tuple[float, ...]


class Meter:
    """Asks for batches on and on, so that every number is new."""

    def __init__(self, client: Client, host: Host, batches: Batches, options: TeacherBench) -> None:
        self._client, self._host, self._batches, self._options = client, host, batches, options
        self._next = 0

    def check(self) -> int:
        """Compare every content, asked for as in a measurement, byte by byte; how many. Raises RuntimeError for a wrong one."""
        count = 2 * self._batches.shape.num_contents
        seen: list[int] = []

        def compare(number: int, pieces: Sequence[memoryview]) -> None:
            self._batches.compare(number, pieces)
            seen.append(number)

        numbers = self._numbers(count)
        self._client.fetch(numbers, self._options.in_flight, compare)
        if seen != list(numbers):
            raise RuntimeError(f"asked for batches {numbers}, got {seen}")
        return count

    def measure(self) -> Moved:
        """One pass."""
        o, client, taken = self._options, self._client, [0, 0]

        def take(number: int, pieces: Sequence[memoryview]) -> None:
            taken[0] += 1
            taken[1] += sum(map(len, pieces))

        gc.collect()
        client.fetch(self._numbers(o.in_flight), o.in_flight, take)  # memory and connections are warm again after the other rows
        taken[:] = [0, 0]
        self._settle()
        numbers = self._numbers(o.batches)
        server_cpu, client_cpu, began = self._host.cpu_s(), time.process_time(), time.perf_counter()
        client.fetch(numbers, o.in_flight, take)
        wall_s = time.perf_counter() - began
        self._settle()
        server_cpu_s, client_cpu_s = self._host.cpu_s() - server_cpu, time.process_time() - client_cpu
        if taken != [o.batches, o.batches * self._batches.num_bytes]:
            raise RuntimeError(f"asked for {o.batches} batches of {self._batches.num_bytes} bytes; {taken[0]} with {taken[1]} bytes came")
        latencies = []
        for number in self._numbers(o.singles):
            began = time.perf_counter()
            client.fetch(range(number, number + 1), 1, take)
            latencies.append(time.perf_counter() - began)
        return Moved(o.batches, self._batches.num_bytes, wall_s, client_cpu_s, server_cpu_s, tuple(latencies))

    def _numbers(self, count: int) -> range:
        first, self._next = self._next, self._next + count
        return range(first, self._next)

    def _settle(self) -> None:
        """Wait until both processes are idle; on a machine where they never are, go on after a while."""
        deadline, before = time.monotonic() + SETTLE_S, -1.0
        while time.monotonic() < deadline:
            now = self._host.cpu_s() + time.process_time()
            if now - before < 0.1 * IDLE_S:
                return
            before = now
            time.sleep(IDLE_S)

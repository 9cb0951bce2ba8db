"""What the ranks of the doctor's small launch do: collectives with known answers, and how fast they are.

Started like a phase, by the launcher over the hostfile. Rank 0 prints one line with the measurements; a wrong value or a rank that does
not come ends the job with an error. Sizes are small: this finds a wrong network, not the last percent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from m2mkd_ds.distributed.world import World, gather_object, init_world, shutdown

MARK = "M2MKD_EXCHANGE "
LIMIT_S = 75
"""No rank outlives this, whatever became of its launcher."""
COLLECTIVE_LIMIT_S = 40.0
NUM_FLOATS = 2**20
REPEATS = 7


class WrongValueError(RuntimeError):
    """A collective brought other numbers than it must."""


def check_values(world: World) -> None:
    """An all-reduce and an all-to-all with numbers that every rank can work out. Raises WrongValueError."""
    numbers = torch.arange(8, dtype=torch.float32, device=world.device)
    total = numbers * (world.rank + 1)
    torch.distributed.all_reduce(total)
    expected = numbers * (world.size * (world.size + 1) / 2)
    _require_equal("all-reduce", world, total, expected)
    # Rank r sends 1000 r + s to rank s.
    sent = 1000.0 * world.rank + torch.arange(world.size, dtype=torch.float32, device=world.device)
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent)
    expected = 1000.0 * torch.arange(world.size, dtype=torch.float32, device=world.device) + world.rank
    _require_equal("all-to-all", world, received, expected)


def _require_equal(what: str, world: World, found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        where = f"rank {world.rank} of {socket.gethostname()}"
        raise WrongValueError(f"{what} on {where}: {found.tolist()}, expected {expected.tolist()}")


def measure(world: World) -> dict[str, float]:
    """Median latency of a one-number all-reduce in microseconds, and what 4 MiB a rank move at, in GB/s of each rank's link.

    An all-reduce puts 2 (n - 1) / n of its bytes on a link in each direction, an all-to-all (n - 1) / n.
    """
    one = torch.ones(1, device=world.device)
    many = torch.ones(NUM_FLOATS - NUM_FLOATS % world.size, device=world.device)
    out = torch.empty_like(many)
    share = (world.size - 1) / world.size
    giga = many.numel() * many.element_size() / 1e9
    return {
        "latency_us": 1e6 * _median_s(world, lambda: torch.distributed.all_reduce(one)),
        "all_reduce_gbs": 2 * share * giga / _median_s(world, lambda: torch.distributed.all_reduce(many)),
        "all_to_all_gbs": share * giga / _median_s(world, lambda: torch.distributed.all_to_all_single(out, many)),
    }


def _median_s(world: World, work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        torch.distributed.barrier()
        started = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first makes connections


def main() -> None:
    """The whole job of one rank."""
    signal.alarm(LIMIT_S)
    world = init_world(COLLECTIVE_LIMIT_S, start_timeout_s=COLLECTIVE_LIMIT_S)
    check_values(world)
    speeds = measure(world)
    network = os.environ.get("NCCL_SOCKET_IFNAME") if world.device.type == "cuda" else os.environ.get("GLOO_SOCKET_IFNAME")
    ranks = gather_object({"host": socket.gethostname(), "interface": network, "device": str(world.device)})
    if world.is_main:
        sys.stdout.write(f"{MARK}{json.dumps({'ranks': ranks, **speeds})}\n")
        sys.stdout.flush()
    shutdown()


if __name__ == "__main__":
    main()

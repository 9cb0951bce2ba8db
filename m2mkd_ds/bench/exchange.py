"""Level `a2a`: the exchange of expert parallelism, rows to the ranks that hold their experts and back, without any compute.

Each rank holds E / N consecutive experts and sends every one of them its rows by an all-to-all with uneven parts. One forward pass is
two exchanges (there and back), one backward pass two more. Shape letters: R rows, D width, E experts, N ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.bench.cases import Absent, Case, Ran
from m2mkd_ds.bench.workload import Workload
from m2mkd_ds.distributed.world import World

PEER = "all_to_all"


@dataclass(frozen=True)
class Splits:
    """Rows that this rank sends to, and gets from, each rank."""

    send: list[int]
    receive: list[int]


def exchange_case(work: Workload, world: World) -> Case | Absent:
    """Rows there and back; what comes back is what was sent."""
    if world.size == 1:
        return Absent(PEER, "one rank has nobody to exchange with; start by `deepspeed --num_gpus N --module m2mkd_ds bench experts ...`")
    if work.options.experts % world.size:
        return Absent(PEER, f"--experts {work.options.experts} do not divide over {world.size} ranks")
    splits = make_splits(work.load, world)
    leaf_RD = work.rows_RD.detach().clone().requires_grad_()
    back = Splits(splits.receive, splits.send)
    return Case(
        PEER,
        lambda: Ran(_Exchange.apply(_Exchange.apply(leaf_RD, splits), back)),
        lambda y: y.backward(work.grad_RD),
        [leaf_RD],
        kept_rows=leaf_RD.shape[0],
        computed_rows=leaf_RD.shape[0],
        note=f"rows to {world.size} ranks and back; forward and backward are two exchanges each",
    )


def make_splits(load_E: list[int], world: World) -> Splits:
    """From this rank's load of every expert; the ranks tell each other (a collective)."""
    share = len(load_E) // world.size
    send = [sum(load_E[rank * share : (rank + 1) * share]) for rank in range(world.size)]
    send_N = torch.tensor(send, device=world.device)
    receive_N = torch.empty_like(send_N)
    torch.distributed.all_to_all_single(receive_N, send_N)
    return Splits(send, receive_N.tolist())  # host sync


def bytes_of(work: Workload, world: World) -> tuple[int, int]:
    """(bytes that this rank brings into one exchange, those of them that leave it)."""
    share = len(work.load) // world.size
    row_bytes = work.options.dim * work.rows_RD.element_size()
    kept = sum(work.load[world.rank * share : (world.rank + 1) * share])
    return sum(work.load) * row_bytes, (sum(work.load) - kept) * row_bytes


class _Exchange(torch.autograd.Function):
    """Uneven all-to-all of rows; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, splits: Splits) -> Tensor:
        ctx.splits = splits
        return _all_to_all(rows_RD, splits.send, splits.receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0].contiguous(), ctx.splits.receive, ctx.splits.send), None


def _all_to_all(rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
    received_RD = rows_RD.new_empty(sum(receive), rows_RD.shape[1])
    torch.distributed.all_to_all_single(received_RD, rows_RD, receive, send)
    return received_RD

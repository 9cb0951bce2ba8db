"""Level `a2a`: the exchange of expert parallelism, rows to the ranks that hold their experts and back, without any compute.

It is the exchange that training uses (`distributed.expert_parallel`): each rank holds E / N consecutive experts and is sent their rows
by an all-to-all with uneven parts. One forward pass is two exchanges (there and back), one backward pass two more. What the ranks tell
each other before (how many rows come) is not timed here; it is part of `expert_parallel` at the level `layer`.
Shape letters: R rows, D width, E experts, N ranks.
"""

from __future__ import annotations

from m2mkd_ds.bench.cases import Absent, Case, Ran
from m2mkd_ds.bench.workload import Workload
from m2mkd_ds.distributed.expert_parallel import plan_exchange, return_rows, send_rows
from m2mkd_ds.distributed.groups import expert_groups
from m2mkd_ds.distributed.world import World

PEER = "all_to_all"


def why_not(work: Workload, world: World) -> str:
    """Why experts cannot be spread over this job's ranks, or an empty string."""
    if world.size == 1:
        return "one rank has nobody to exchange with; start by `deepspeed --num_gpus N --module m2mkd_ds bench experts ...`"
    if work.options.experts % world.size:
        return f"--experts {work.options.experts} do not divide over {world.size} ranks"
    return ""


def exchange_case(work: Workload, world: World) -> Case | Absent:
    """Rows there and back; what comes back is what was sent."""
    reason = why_not(work, world)
    if reason:
        return Absent(PEER, reason)
    groups = expert_groups(world, world.size)
    exchange = plan_exchange(work.plan.offsets_E, groups)
    leaf_RD = work.rows_RD.detach().clone().requires_grad_()
    num_rows = leaf_RD.shape[0]
    return Case(
        PEER,
        lambda: Ran(return_rows(send_rows(leaf_RD, exchange, groups), exchange, num_rows, groups)),
        lambda y: y.backward(work.grad_RD),
        [leaf_RD],
        kept_rows=num_rows,
        computed_rows=num_rows,
        note=f"rows to {world.size} ranks and back; forward and backward are two exchanges each",
    )


def bytes_of(work: Workload, world: World) -> tuple[int, int]:
    """(bytes that this rank brings into one exchange, those of them that leave it)."""
    share = len(work.load) // world.size
    row_bytes = work.options.dim * work.rows_RD.element_size()
    kept = sum(work.load[world.rank * share : (world.rank + 1) * share])
    return sum(work.load) * row_bytes, (sum(work.load) - kept) * row_bytes

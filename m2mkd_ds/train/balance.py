"""Loss-free balancing in the training loop: counts of all micro-batches and ranks -> one move of every router's `balance_bias`.

    StepOutput.load (a micro-batch) --add_loads--> one optimizer step on this rank --balance_routers--> one all_reduce, new biases

Counts come up by return, from the forward pass that the loss belongs to: a pass that activation checkpointing runs again returns
nothing to the loop, so nothing is counted twice, and an evaluation moves nothing. Shape letter: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from m2mkd_ds.distributed.world import all_reduce_sum
from m2mkd_ds.moe.routers import LinearRouter
from m2mkd_ds.moe.routers.balance import balanced_bias

Loads = dict[int, Tensor]
"""Block number -> choices of each expert, int64 [E]."""


def biased_routers(module: nn.Module) -> dict[int, LinearRouter]:
    """Routers with a balance bias by block number; empty for most modules."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, LinearRouter) and child.balance_bias is not None:
            found[int(name.split("blocks.")[1].split(".")[0])] = child
    return found


def add_loads(total: Mapping[int, Tensor], load: Mapping[int, Tensor]) -> Loads:
    """Sum by block; a block that `total` lacks counts from zero."""
    return {block: total[block] + load_E if block in total else load_E for block, load_E in load.items()}


def balance_routers(pairs: Iterable[tuple[Mapping[int, LinearRouter], Mapping[int, Tensor]]]) -> None:
    """Move the biases of several modules, given as (routers, loads of this rank in one optimizer step). Collective, one all_reduce.

    Every rank passes the same routers. Called after the optimizer step, never in evaluation. Needs at least one router.
    """
    work = [(router, loads[block]) for routers, loads in pairs for block, router in sorted(routers.items())]
    sizes = [load_E.numel() for _, load_E in work]
    totals = all_reduce_sum(torch.cat([load_E for _, load_E in work])).split(sizes)
    for (router, _), total_E in zip(work, totals, strict=True):
        assert router.balance_bias is not None
        # In place: the engine saves and restores this very tensor.
        router.balance_bias.copy_(balanced_bias(router.balance_bias, total_E, router.config.balance_rate))

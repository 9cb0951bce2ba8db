"""Routers by name, one file each; a router is a module `router(x_TD) -> Routing` with a linear map from width D to E logits.

Reading order: linear.py (what all share), topk.py, noisy_topk.py, expert_choice.py, forced.py; capacity.py (who is dropped), balance.py.
"""

from __future__ import annotations

import torch

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.routers.expert_choice import ExpertChoiceRouter
from m2mkd_ds.moe.routers.forced import BalancedRouter, ZipfRouter
from m2mkd_ds.moe.routers.linear import LinearRouter
from m2mkd_ds.moe.routers.noisy_topk import NoisyTopKRouter
from m2mkd_ds.moe.routers.topk import TopKRouter

__all__ = ["ROUTERS", "LinearRouter", "make_router"]

ROUTERS: dict[str, type[LinearRouter]] = {
    "topk": TopKRouter,
    "noisy_topk": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "balanced": BalancedRouter,
    "zipf": ZipfRouter,
}
"""By `RouterConfig.kind`."""


def make_router(dim: int, num_experts: int, config: RouterConfig, generator: torch.Generator | None = None) -> LinearRouter:
    """The router that `config` describes. Raises ValueError, naming the field, for settings that cannot work."""
    if config.kind not in ROUTERS:
        raise ValueError(f"router.kind is {config.kind!r}; allowed is one of {list(ROUTERS)}")
    return ROUTERS[config.kind](dim, num_experts, config, generator)

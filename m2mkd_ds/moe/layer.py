"""MoELayer: the sparse replacement of a block's feed-forward network. Router -> dispatch plan -> experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.backends import Activation
from m2mkd_ds.moe.dispatch import make_plan
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.moe.routers import make_router
from m2mkd_ds.moe.routing import Routing


class MoELayer(nn.Module):
    """E experts of width `hidden` behind a router; state-dict keys `router.*` and `experts.*`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        router: RouterConfig,
        backend: str = "auto",
        activation: Activation = "gelu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = make_router(dim, num_experts, router, generator)
        self.experts = Experts(dim, hidden, num_experts, backend, activation, generator)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Routing]:
        """Tokens [B, L, D] -> [B, L, D] and the routing decision over T = B*L tokens (images in order)."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        routing: Routing = self.router(x_TD)
        plan = make_plan(routing.expert_ids_TK, self.num_experts, routing.max_rows)
        return self.experts(x_TD, routing.weights_TK, plan).view(x_BLD.shape), routing

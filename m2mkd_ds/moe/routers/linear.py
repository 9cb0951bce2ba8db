"""LinearRouter: what all routers share - the linear map to logits, its precision, the balance bias, the common losses.

    x_TD -> logits_TE (at least fp32) -> route(logits_TE): the router's own rule -> Routing

Shape letters: T tokens, D width, E experts, K choices a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.config import RouterConfig, check_router
from m2mkd_ds.moe.losses import importance_loss, switch_loss, z_loss
from m2mkd_ds.moe.routers.capacity import apply_capacity, expert_capacity
from m2mkd_ds.moe.routing import Routing, count_load, routing_stats


class LinearRouter(nn.Module, ABC):
    """`weight` [E, D], `bias` [E] if configured, and the buffer `balance_bias` [E] with balance_rate > 0.

    T is the number of tokens of this forward pass on this rank: wherever a capacity bounds the experts, what is decided for an
    image depends on the other images of its batch. Raises ValueError for settings that cannot work.
    """

    balance_bias: Tensor | None

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_router(config, num_experts)
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.register_buffer("balance_bias", torch.zeros(num_experts, dtype=torch.float32) if config.balance_rate else None)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal weights (std 0.02), zero biases."""
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        for bias in (self.bias, self.balance_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearRouter:
        """Module.to and its kin, which leave `balance_bias` in fp32: steps of 0.001 would vanish in bf16."""
        exact_E = self.balance_bias
        super()._apply(fn, recurse)
        if exact_E is not None and self.balance_bias is not None and self.balance_bias.dtype != torch.float32:
            self.balance_bias = exact_E.to(self.balance_bias.device)
        return self

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, E] in at least fp32 whatever the weights' dtype and autocast are: bf16 logits tie and flip experts."""
        with _without_autocast(x_TD.device):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            bias_E = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x_TD.to(dtype), self.weight.to(dtype), bias_E)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route T tokens (T may be 0)."""
        logits_TE = self.logits(x_TD)
        with _without_autocast(x_TD.device):
            return self.route(logits_TE)

    @abstractmethod
    def route(self, logits_TE: Tensor) -> Routing:
        """The router's rule."""

    @property
    def capacity_factor(self) -> float:
        """The factor of the mode that the module is in."""
        return self.config.capacity_factor if self.training else self.config.eval_capacity_factor

    def finish(self, logits_TE: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, more_losses: dict[str, Tensor]) -> Routing:
        """What follows when tokens have chosen K different experts: capacity, losses, statistics.

        `logits_TE` are those without noise. Losses see the demand, before drops: an expert must not look balanced because it is full.
        """
        load_E = count_load(expert_ids_TK, self.num_experts)
        losses = self.losses(logits_TE, load_E) | more_losses
        num_tokens, top_k = expert_ids_TK.shape
        max_rows = None
        if self.capacity_factor:
            capacity = expert_capacity(num_tokens * top_k, self.num_experts, self.capacity_factor, self.config.capacity_multiple)
            if capacity < num_tokens:  # else nothing can be dropped: a token chooses an expert once
                expert_ids_TK, weights_TK = apply_capacity(
                    expert_ids_TK, weights_TK, self.num_experts, capacity, self.config.capacity_priority
                )
                max_rows = min(num_tokens * top_k, self.num_experts * capacity)
        stats = routing_stats(logits_TE, load_E, expert_ids_TK, weights_TK)
        return Routing(expert_ids_TK, weights_TK, losses, stats, max_rows)

    def losses(self, logits_TE: Tensor, load_E: Tensor) -> dict[str, Tensor]:
        """The weighted losses that need only logits and demand."""
        config, losses = self.config, dict[str, Tensor]()
        probs_TE = logits_TE.softmax(dim=-1)
        if config.importance_weight:
            losses["importance"] = config.importance_weight * importance_loss(probs_TE)
        if config.switch_weight:
            losses["switch"] = config.switch_weight * switch_loss(probs_TE, load_E)
        if config.z_weight:
            losses["z"] = config.z_weight * z_loss(logits_TE)
        return losses

    def extra_repr(self) -> str:
        c = self.config
        capacity = f"{c.capacity_factor} train, {c.eval_capacity_factor} eval"
        return f"kind={c.kind!r}, num_experts={self.num_experts}, top_k={c.top_k}, softmax={c.softmax!r}, capacity_factor={capacity}"


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off; nothing to switch on a device that has none (`meta`, where only shapes are computed)."""
    return torch.autocast(device_type=device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()

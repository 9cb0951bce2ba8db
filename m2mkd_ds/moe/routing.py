"""Routers: which experts a token goes to, with which weight. Pure per-token math in fp32, deterministic in every mode.

    x_TD -> logits_TE -> (expert_ids_TK, weights_TK), losses, stats

A router returns a `Routing`; everything behind it (dispatch, backends, combine) works for any router that does.
Shape letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.losses import importance_loss, switch_loss, z_loss

logger = logging.getLogger("m2mkd_ds")


@dataclass(frozen=True)
class RoutingStats:
    """What a layer did with one batch; detached, on the device of the layer, to be merged by `moe.telemetry`."""

    load_E: Tensor
    """int64: rows that chose each expert."""
    importance_E: Tensor
    """fp32: sum of the combine weights given to each expert."""
    entropy: Tensor
    """fp32 scalar: mean over tokens of the entropy of softmax(logits) over all experts, in nats."""
    max_logit: Tensor
    """fp32 scalar: largest logit."""


class Routing(NamedTuple):
    """The decision for T tokens. A tuple, because ZeRO-3 looks for the tensors of a module's output in tuples."""

    expert_ids_TK: Tensor
    """int64 in [0, E); E where the choice has no expert (dropped for capacity; a slot not used), allowed only with `max_rows`."""
    weights_TK: Tensor
    """fp32 combine weights (fp64 for fp64 input); gradients flow to the router through them. Zero where there is no expert."""
    losses: dict[str, Tensor]
    """Auxiliary losses, already multiplied by their configured weight; only those whose weight is not zero."""
    stats: RoutingStats
    max_rows: int | None = None
    """None: every choice has an expert. Else an upper bound, known without looking at the data, on how many choices have one."""


class TopKRouter(nn.Module):
    """Linear router with top-k choice, dropless: every token gets all its K experts.

    softmax="after": top-k of the logits, then softmax over the kept (FastMoE's NaiveGate, used by the m2mKD authors);
    the same as softmax over all, then renormalise. softmax="before": softmax over all experts, then top-k, weights kept
    raw (V-MoE) or divided by their sum (`renormalize`).
    """

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 1 <= config.top_k <= num_experts:
            raise ValueError(f"router.top_k is {config.top_k}; allowed is 1 to num_experts = {num_experts}")
        if config.softmax not in ("before", "after"):
            raise ValueError(f"router.softmax is {config.softmax!r}; allowed is `before` or `after`")
        self.config = config
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.reset_parameters(generator)
        constant_weight = config.top_k == 1 and (config.softmax == "after" or config.renormalize)
        if constant_weight and num_experts > 1 and not (config.importance_weight or config.switch_weight or config.z_weight):
            logger.warning(
                "router: with top_k=1 and these settings every combine weight is 1, so the router gets no gradient; use softmax=before"
            )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal weights (std 0.02), zero bias."""
        nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits [T, E] in at least fp32 whatever the weights' dtype and autocast are: bf16 logits tie and flip experts."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            bias_E = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x_TD.to(dtype), self.weight.to(dtype), bias_E)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route T tokens (T may be 0)."""
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        expert_ids_TK = top_k_ids(logits_TE, self.config.top_k)
        if self.config.softmax == "after":
            weights_TK = logits_TE.gather(1, expert_ids_TK).softmax(dim=-1)
        else:
            weights_TK = probs_TE.gather(1, expert_ids_TK)
            if self.config.renormalize:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        load_E = count_load(expert_ids_TK, self.num_experts)
        losses = self._losses(logits_TE, probs_TE, load_E)
        return Routing(expert_ids_TK, weights_TK, losses, routing_stats(logits_TE, expert_ids_TK, weights_TK, load_E))

    def _losses(self, logits_TE: Tensor, probs_TE: Tensor, load_E: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if self.config.importance_weight:
            losses["importance"] = self.config.importance_weight * importance_loss(probs_TE)
        if self.config.switch_weight:
            losses["switch"] = self.config.switch_weight * switch_loss(probs_TE, load_E)
        if self.config.z_weight:
            losses["z"] = self.config.z_weight * z_loss(logits_TE)
        return losses

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.config.top_k}, softmax={self.config.softmax!r}"


def top_k_ids(logits_TE: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of each token, largest first; among equals the lower id.

    A stable sort, because `torch.topk` promises no order among equal values and differs between devices.
    """
    return logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def count_load(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Rows per expert, int64 [E]. By comparison, not `bincount`: that waits for the GPU."""
    experts_E = torch.arange(num_experts, device=expert_ids_TK.device)
    return (expert_ids_TK[..., None] == experts_E).sum(dim=(0, 1))


@torch.no_grad()
def routing_stats(logits_TE: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, load_E: Tensor) -> RoutingStats:
    """Statistics of one batch; for T = 0 all of them are zero."""
    num_tokens, num_experts = logits_TE.shape
    experts_E = torch.arange(num_experts, device=logits_TE.device)
    chosen_TKE = expert_ids_TK[..., None] == experts_E
    importance_E = (chosen_TKE * weights_TK[..., None]).sum(dim=(0, 1)).float()
    log_probs_TE = logits_TE.log_softmax(dim=-1)
    entropy = -(log_probs_TE.exp() * log_probs_TE).sum() / max(num_tokens, 1)
    max_logit = logits_TE.max() if num_tokens else logits_TE.new_zeros(())
    return RoutingStats(load_E, importance_E, entropy.float(), max_logit.float())

"""What every router returns: `Routing`, the decision for T tokens, and `RoutingStats`, what it did in numbers.

    x_TD -> router (moe/routers/) -> Routing -> dispatch, experts, combine

Everything behind a router works for any module that returns a `Routing`. Shape letters: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


def _zero() -> Tensor:
    return torch.zeros(())


@dataclass(frozen=True)
class RoutingStats:
    """What a layer did with one batch; detached, on the device of the layer, to be merged by `moe.telemetry`."""

    load_E: Tensor
    """int64: choices of each expert, those dropped for capacity included (the demand)."""
    importance_E: Tensor
    """fp32: sum of the combine weights given to each expert."""
    entropy: Tensor
    """fp32 scalar: mean over tokens of the entropy of softmax(logits) over all experts, in nats."""
    max_logit: Tensor
    """fp32 scalar: largest logit."""
    drop_rate: Tensor = field(default_factory=_zero)
    """fp32 scalar: share of the choices that were dropped for capacity."""
    uncovered: Tensor = field(default_factory=_zero)
    """fp32 scalar: share of the tokens that no expert works on (all choices dropped, or chosen by no expert)."""


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


def top_k_ids(scores_TE: Tensor, k: int) -> Tensor:
    """Ids of the k largest scores of each token, largest first; among equals the lower id.

    A stable sort, because `torch.topk` promises no order among equal values and differs between devices.
    """
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def count_load(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Choices of each expert, int64 [E]; id E counts nowhere. By comparison, not `bincount`: that waits for the GPU."""
    experts_E = torch.arange(num_experts, device=expert_ids_TK.device)
    return (expert_ids_TK[..., None] == experts_E).sum(dim=(0, 1))


@torch.no_grad()
def routing_stats(
    logits_TE: Tensor, load_E: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, importance_E: Tensor | None = None
) -> RoutingStats:
    """Statistics of one batch; for T = 0 all of them are zero.

    `load_E` is the demand; `expert_ids_TK` and `weights_TK` are those of the Routing, after all drops. `importance_E` may be given
    where it is known without a [T, K, E] tensor.
    """
    num_tokens, num_experts = logits_TE.shape
    if importance_E is None:
        chosen_TKE = expert_ids_TK[..., None] == torch.arange(num_experts, device=logits_TE.device)
        importance_E = (chosen_TKE * weights_TK[..., None]).sum(dim=(0, 1))
    log_probs_TE = logits_TE.log_softmax(dim=-1)
    entropy = -(log_probs_TE.exp() * log_probs_TE).sum() / max(num_tokens, 1)
    max_logit = logits_TE.max() if num_tokens else logits_TE.new_zeros(())
    kept_TK = expert_ids_TK < num_experts
    demand = load_E.sum()
    drop_rate = (demand - kept_TK.sum()) / demand.clamp_min(1)
    uncovered = (~kept_TK.any(dim=-1)).sum() / max(num_tokens, 1)
    return RoutingStats(load_E, importance_E.float(), entropy.float(), max_logit.float(), drop_rate.float(), uncovered.float())

"""ExpertChoiceRouter: each expert takes its C best tokens (arXiv 2202.09368, section 3.2), so every expert has the same load.

Shape letters: T tokens, E experts, K = E slots a token, C tokens an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.moe.routers.capacity import expert_capacity
from m2mkd_ds.moe.routers.linear import LinearRouter
from m2mkd_ds.moe.routing import Routing, routing_stats


class ExpertChoiceRouter(LinearRouter):
    """S = softmax over experts of the logits; expert e takes the C tokens with the largest S[:, e] (of equals the first), with
    weight S. C = ceil(T * capacity_factor / E), at most T. A token may get any number of experts, none too.

    Slot e of a token holds e if expert e took it, else E. PAPER: a token's experts depend on the tokens beside it, in evaluation too.
    """

    @property
    def capacity_factor(self) -> float:
        """eval_capacity_factor=0 means as in training."""
        return super().capacity_factor or self.config.capacity_factor

    def route(self, logits_TE: Tensor) -> Routing:
        num_tokens, num_experts = logits_TE.shape
        probs_TE = logits_TE.softmax(dim=-1)
        capacity = min(num_tokens, expert_capacity(num_tokens, num_experts, self.capacity_factor, self.config.capacity_multiple))
        # A token's place in the order of each expert: the inverse of a permutation a column, so no two writes meet.
        order_TE = probs_TE.detach().sort(dim=0, descending=True, stable=True).indices
        positions_TE = torch.arange(num_tokens, device=order_TE.device)[:, None].expand_as(order_TE)
        taken_TE = torch.empty_like(order_TE).scatter_(0, order_TE, positions_TE) < capacity
        expert_ids_TE = torch.where(taken_TE, torch.arange(num_experts, device=order_TE.device), num_experts)
        weights_TE = torch.where(taken_TE, probs_TE, 0)
        load_E = taken_TE.sum(dim=0)
        stats = routing_stats(logits_TE, load_E, expert_ids_TE, weights_TE, weights_TE.detach().sum(dim=0))
        return Routing(expert_ids_TE, weights_TE, self.losses(logits_TE, load_E), stats, max_rows=num_experts * capacity)

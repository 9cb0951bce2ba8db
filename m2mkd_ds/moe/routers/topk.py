"""TopKRouter: each token goes to the K experts with the largest scores.

Shape letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.routers.linear import LinearRouter
from m2mkd_ds.moe.routing import Routing, top_k_ids

logger = logging.getLogger("m2mkd_ds")


class TopKRouter(LinearRouter):
    """Linear router with top-k choice.

    softmax="after": top-k of the logits, then softmax over the kept (FastMoE's NaiveGate, used by the m2mKD authors);
    the same as softmax over all, then renormalise. softmax="before": softmax over all experts, then top-k, weights kept
    raw (V-MoE, Switch) or divided by their sum (`renormalize`).
    """

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(dim, num_experts, config, generator)
        constant_weight = config.top_k == 1 and (config.softmax == "after" or config.renormalize)
        if constant_weight and num_experts > 1 and not (config.importance_weight or config.switch_weight or config.z_weight):
            logger.warning(
                "router: with top_k=1 and these settings every combine weight is 1, so the router gets no gradient; use softmax=before"
            )

    def route(self, logits_TE: Tensor) -> Routing:
        expert_ids_TK, weights_TK = self.choose(logits_TE)
        return self.finish(logits_TE, expert_ids_TK, weights_TK, {})

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids, best first, and combine weights, [T, K] each."""
        probs_TE = logits_TE.softmax(dim=-1)
        if self.balance_bias is None:
            expert_ids_TK = top_k_ids(logits_TE, self.config.top_k)
        else:
            # arXiv 2408.15664, equation 3: the bias moves the choice among the scores in [0, 1], never the weights.
            expert_ids_TK = top_k_ids(probs_TE.detach() + self.balance_bias.to(probs_TE.dtype), self.config.top_k)
        if self.config.softmax == "after":
            return expert_ids_TK, logits_TE.gather(1, expert_ids_TK).softmax(dim=-1)
        weights_TK = probs_TE.gather(1, expert_ids_TK)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return expert_ids_TK, weights_TK

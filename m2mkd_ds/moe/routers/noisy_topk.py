"""NoisyTopKRouter: V-MoE's router (arXiv 2106.05974, section 2.1 and appendix A), after google-research/vmoe where the paper is silent.

Shape letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.moe.losses import load_loss
from m2mkd_ds.moe.routers.topk import TopKRouter
from m2mkd_ds.moe.routing import Routing


class NoisyTopKRouter(TopKRouter):
    """Top-k of softmax(logits + N(0, (noise/E)^2)), weights not renormalised; without noise in evaluation.

    The noise is drawn from torch's global generator, which the training loop seeds for every micro-batch. The importance loss sees
    the softmax without noise; the load loss exists only where there is noise, so not in evaluation.
    """

    def route(self, logits_TE: Tensor) -> Routing:
        std = self.config.noise / self.num_experts
        if not self.training or std == 0.0:
            return super().route(logits_TE)
        noisy_TE = logits_TE + std * torch.randn_like(logits_TE)
        expert_ids_TK, weights_TK = self.choose(noisy_TE)
        losses = {}
        if self.config.load_weight:
            losses["load"] = self.config.load_weight * load_loss(logits_TE, noisy_TE, expert_ids_TK, std)
        return self.finish(logits_TE, expert_ids_TK, weights_TK, losses)

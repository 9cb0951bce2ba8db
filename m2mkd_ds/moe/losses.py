"""Auxiliary router losses as pure functions; unweighted scalars, differentiable in the router's probabilities or logits.

All are finite (zero) for T = 0, so that a rank with no token does not poison the sum.
Shape letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance_loss(probs_TE: Tensor) -> Tensor:
    """Squared coefficient of variation of each expert's summed softmax probability (V-MoE, arXiv 2106.05974, appendix A.2).

    CV^2 = population variance / mean^2; 0 when balanced, E - 1 when one expert gets everything.
    """
    return _squared_cv(probs_TE.sum(dim=0))


def load_loss(logits_TE: Tensor, noisy_TE: Tensor, expert_ids_TK: Tensor, std: float) -> Tensor:
    """Squared coefficient of variation of each expert's mean probability of being chosen (V-MoE, appendix A.2).

    p = P(logit + new noise >= threshold) = 1 - Phi((threshold - logit) / std), where the threshold of a token is its K-th largest
    noisy logit and `logits_TE` are those without noise. `expert_ids_TK` are the chosen experts, the K-th best last. The gradient flows
    through logit and threshold.
    """
    thresholds_T1 = noisy_TE.gather(1, expert_ids_TK[:, -1:])
    probs_TE = torch.special.ndtr((logits_TE - thresholds_T1) / std)  # = 1 - Phi(-x), without its cancellation
    return _squared_cv(probs_TE.sum(dim=0) / max(logits_TE.shape[0], 1))


def _squared_cv(values_E: Tensor) -> Tensor:
    """Population variance over mean^2."""
    # Means here are far above the clamp for any T >= 1; the clamp only turns 0/0 into 0 for T = 0.
    return values_E.var(correction=0) / values_E.mean().square().clamp_min(1e-12)


def switch_loss(probs_TE: Tensor, load_E: Tensor) -> Tensor:
    """E * sum_e f_e * P_e (Switch Transformer, arXiv 2101.03961, equation 4).

    f_e is the share of routed rows that went to expert e (all K choices counted, so the f_e sum to 1 for any K) and P_e the
    mean probability of e. 1 when balanced, E when one expert gets everything. The gradient flows through P_e alone.
    """
    num_tokens, num_experts = probs_TE.shape
    share_E = load_E.to(probs_TE.dtype) / load_E.sum().clamp_min(1)
    mean_prob_E = probs_TE.sum(dim=0) / max(num_tokens, 1)
    return num_experts * (share_E * mean_prob_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=-1).square().sum() / max(logits_TE.shape[0], 1)

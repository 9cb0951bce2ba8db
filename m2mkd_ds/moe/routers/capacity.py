"""Capacity: an expert takes at most C choices of a forward pass, and who is served first. Gathers, sorts and searches only.

PAPER: V-MoE (arXiv 2106.05974) section 2 and algorithms 1 and 2; the rounding is that of google-research/vmoe, which routes groups of
images by themselves, while here the group is the whole forward pass of a rank. Shape letters: T tokens, K choices a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_capacity(num_choices: int, num_experts: int, factor: float, multiple: int) -> int:
    """C = ceil(choices * factor / E), rounded up to a multiple: the even share at factor 1.

    In integers, to a millionth of the factor: in floating point 2760 * 1.1 / 4 is a little above 759, and C would be 760.
    """
    millionths = round(factor * 1_000_000)
    capacity = -(-num_choices * millionths // (num_experts * 1_000_000))
    return -(-capacity // multiple) * multiple


def apply_capacity(expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, capacity: int, priority: str) -> tuple[Tensor, Tensor]:
    """The first `capacity` claims on each expert stay; the others get id E and weight 0.

    Claims come in this order: all first choices, then all second choices, and so on; within them the tokens in order
    (priority="order"), or those with the largest weight first ("batch"; equal ones in order).
    """
    num_tokens, top_k = expert_ids_TK.shape
    if priority == "order":
        kept_KT = _first_claims(expert_ids_TK.t().reshape(-1), num_experts, capacity).view(top_k, num_tokens)
        kept_TK = kept_KT.t().contiguous()
    else:
        largest_T = weights_TK.detach().max(dim=-1).values
        served_T = largest_T.sort(descending=True, stable=True).indices
        claims_KT = expert_ids_TK.index_select(0, served_T).t()
        kept_KT = _first_claims(claims_KT.reshape(-1), num_experts, capacity).view(top_k, num_tokens)
        kept_TK = kept_KT.t().index_select(0, inverse(served_T))
    return torch.where(kept_TK, expert_ids_TK, num_experts), torch.where(kept_TK, weights_TK, 0)


def _first_claims(expert_ids_N: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Whether each of N claims, in the order of service, is among the first `capacity` ones on its expert."""
    # 1. Claims by expert, in order inside each. 2. A claim's place: its position less that of its expert's first. 3. Back.
    sorted_N, order_N = expert_ids_N.sort(stable=True)
    experts_E = torch.arange(num_experts, device=expert_ids_N.device)
    starts_E = torch.searchsorted(sorted_N, experts_E)
    places_N = torch.arange(expert_ids_N.numel(), device=expert_ids_N.device) - starts_E.index_select(0, sorted_N)
    return (places_N < capacity).index_select(0, inverse(order_N))


def inverse(order_N: Tensor) -> Tensor:
    """The inverse of a permutation; no two entries write to the same place."""
    positions_N = torch.arange(order_N.numel(), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, positions_N)

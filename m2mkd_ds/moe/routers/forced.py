"""Routers for benchmarks: the choice is a function of T alone, as even or as skewed as asked for, whatever the tokens are.

They have the parameters of a top-k router, so that weights load, and softmax weights over the chosen logits, so that gradients flow and
the work is that of a real router. Shape letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.moe.routers.linear import LinearRouter
from m2mkd_ds.moe.routing import Routing, top_k_ids

ZIPF_SEED = 20240918


class BalancedRouter(LinearRouter):
    """Choice j of token t is expert (t*K + j) mod E: loads differ by one at most."""

    def route(self, logits_TE: Tensor) -> Routing:
        num_tokens, top_k = logits_TE.shape[0], self.config.top_k
        choices_TK = torch.arange(num_tokens * top_k, device=logits_TE.device).view(num_tokens, top_k)
        return self.routed_to(choices_TK % self.num_experts, logits_TE)

    def routed_to(self, expert_ids_TK: Tensor, logits_TE: Tensor) -> Routing:
        """The Routing of a given choice."""
        return self.finish(logits_TE, expert_ids_TK, logits_TE.gather(1, expert_ids_TK).softmax(dim=-1), {})


class ZipfRouter(BalancedRouter):
    """Each token draws K different experts, expert e with a probability proportional to 1 / (e+1)^zipf_exponent.

    The draw is fixed: a hash of (token, expert), not a random generator, so that devices agree.
    """

    def route(self, logits_TE: Tensor) -> Routing:
        # The K largest of log p + Gumbel noise are a draw without replacement in the order of drawing.
        ranks_E = torch.arange(1, self.num_experts + 1, device=logits_TE.device, dtype=torch.float32)
        scores_TE = gumbel_noise(logits_TE.shape[0], self.num_experts, logits_TE.device) - self.config.zipf_exponent * ranks_E.log()
        return self.routed_to(top_k_ids(scores_TE, self.config.top_k), logits_TE)


def gumbel_noise(num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """Fixed standard Gumbel noise [T, E], fp32; the first rows are the same for any T."""
    x_N = torch.arange(num_tokens * num_experts, device=device) + ZIPF_SEED
    # A 32-bit mixing hash (shifts and two odd constants below 2^31, so that int64 products do not overflow).
    x_N = ((x_N ^ (x_N >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x_N = ((x_N ^ (x_N >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    x_N = x_N ^ (x_N >> 15)
    # 23 bits and a half: never 0 and never 1 in fp32.
    uniform_N = ((x_N >> 9).to(torch.float32) + 0.5) / 2**23
    return -(-uniform_N.log()).log().view(num_tokens, num_experts)

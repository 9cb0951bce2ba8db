"""How a token of a V-MoE chooses its experts. Shipped beside the weights; needs torch and transformers only.

    tokens [T, D] -> logits [T, E] -> expert ids and combine weights, K a token -> at most C tokens an expert, if capacity is bounded

Shape letters: T tokens of the whole batch, D width, E experts, K experts a token, N = T*K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vmoe import VMoEConfig


class VMoERouter(nn.Linear):
    """Chooses K experts a token. Computes in float32: in bfloat16 logits tie and tokens change their experts.

    kind "topk": the K best experts of each token. "noisy_topk": the same, with noise on the logits in training mode.
    "expert_choice": each expert takes its C best tokens; then K = E, and slot e is expert e or nobody.
    """

    balance_bias: Tensor | None

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=config.router_bias)
        if config.router_kind not in ("topk", "noisy_topk", "expert_choice"):
            raise ValueError(f"router_kind is {config.router_kind!r}; allowed is topk, noisy_topk or expert_choice")
        self.config = config
        # Moved during training by the experts' loads; only the choice sees it. Fine-tuning leaves it as it is.
        balanced = config.router_balance_rate > 0
        self.register_buffer("balance_bias", torch.zeros(config.num_experts, dtype=torch.float32) if balanced else None)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Module.to and its kin, which leave the balance bias in float32."""
        exact_E = self.balance_bias
        super()._apply(fn, recurse)
        if exact_E is not None and self.balance_bias is not None and self.balance_bias.dtype != torch.float32:
            self.balance_bias = exact_E.to(self.balance_bias.device)
        return self

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, int | None, Tensor]:  # type: ignore[override]
        """-> expert ids [T, K] (E: no expert), combine weights [T, K], how many ids can be less than E (None: all are), weighted sum
        of the balancing losses (0 if none is on)."""
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            bias = None if self.bias is None else self.bias.to(dtype)
            logits_TE = F.linear(x_TD.to(dtype), self.weight.to(dtype), bias)
            if self.config.router_kind == "expert_choice":
                ids_TE, weights_TE, max_rows = self._choice_of_experts(logits_TE)
                return ids_TE, weights_TE, max_rows, self._losses(logits_TE, logits_TE, ids_TE)
            noisy_TE = logits_TE
            if self._noise_std():
                noisy_TE = logits_TE + self._noise_std() * torch.randn_like(logits_TE)
            ids_TK, weights_TK = self._choice_of_tokens(noisy_TE)
            loss = self._losses(logits_TE, noisy_TE, ids_TK)
            return *self._bounded(ids_TK, weights_TK), loss

    def _noise_std(self) -> float:
        noisy = self.training and self.config.router_kind == "noisy_topk"
        return self.config.router_noise / self.config.num_experts if noisy else 0.0

    def _choice_of_tokens(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        probs_TE = logits_TE.softmax(dim=-1)
        scores_TE = logits_TE if self.balance_bias is None else probs_TE.detach() + self.balance_bias.to(probs_TE.dtype)
        # A stable sort, not topk: equal scores go to the lower expert on every device.
        ids_TK = scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, : config.router_top_k].contiguous()
        if config.router_softmax == "after":
            return ids_TK, logits_TE.gather(1, ids_TK).softmax(dim=-1)
        weights_TK = probs_TE.gather(1, ids_TK)
        if config.router_renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return ids_TK, weights_TK

    def _choice_of_experts(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, int]:
        num_tokens, num_experts = logits_TE.shape
        probs_TE = logits_TE.softmax(dim=-1)
        capacity = min(num_tokens, self._capacity(num_tokens))
        order_TE = probs_TE.detach().sort(dim=0, descending=True, stable=True).indices
        taken_TE = order_TE.argsort(dim=0) < capacity
        ids_TE = torch.where(taken_TE, torch.arange(num_experts, device=order_TE.device), num_experts)
        return ids_TE, torch.where(taken_TE, probs_TE, 0), num_experts * capacity

    def _capacity(self, num_choices: int) -> int:
        """C = ceil(choices * factor / E), rounded up to a multiple; 0 for no bound."""
        config = self.config
        factor = config.router_capacity_factor if self.training else config.router_eval_capacity_factor
        if not factor and config.router_kind == "expert_choice":
            factor = config.router_capacity_factor
        multiple = config.router_capacity_multiple
        # In integers: in floating point 2760 * 1.1 / 4 is a little above 759.
        capacity = -(-num_choices * round(factor * 1_000_000) // (config.num_experts * 1_000_000))
        return -(-capacity // multiple) * multiple

    def _bounded(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """Keep the first C claims on each expert. First choices come before second ones; within them tokens in order, or
        (priority "batch") those with the largest weight first."""
        (num_tokens, top_k), num_experts = ids_TK.shape, self.config.num_experts
        capacity = self._capacity(num_tokens * top_k)
        if not capacity or capacity >= num_tokens:
            return ids_TK, weights_TK, None  # nothing can be dropped: a token chooses an expert once
        served_T = torch.arange(num_tokens, device=ids_TK.device)
        if self.config.router_capacity_priority == "batch":
            served_T = weights_TK.detach().max(dim=-1).values.sort(descending=True, stable=True).indices
        sorted_N, order_N = ids_TK.index_select(0, served_T).t().reshape(-1).sort(stable=True)
        starts_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=sorted_N.device))
        places_N = torch.arange(sorted_N.numel(), device=sorted_N.device) - starts_E.index_select(0, sorted_N)
        kept_KT = (places_N < capacity).index_select(0, order_N.argsort()).view(top_k, num_tokens)
        kept_TK = kept_KT.t().index_select(0, served_T.argsort())
        max_rows = min(num_tokens * top_k, num_experts * capacity)
        return torch.where(kept_TK, ids_TK, num_experts), torch.where(kept_TK, weights_TK, 0), max_rows

    def _losses(self, logits_TE: Tensor, noisy_TE: Tensor, ids_TK: Tensor) -> Tensor:
        config = self.config
        loss = logits_TE.new_zeros(())
        if not self.training:
            return loss
        probs_TE = logits_TE.softmax(dim=-1)
        if config.router_importance_weight:
            loss = loss + config.router_importance_weight * _squared_cv(probs_TE.sum(dim=0))
        if config.router_load_weight and self._noise_std():
            # The probability of being chosen if the noise were drawn again: above the K-th largest noisy logit.
            margins_TE = (logits_TE - noisy_TE.gather(1, ids_TK[:, -1:])) / self._noise_std()
            loss = loss + config.router_load_weight * _squared_cv(torch.special.ndtr(margins_TE).mean(dim=0))
        if config.router_switch_weight:
            chosen_E = (ids_TK[..., None] == torch.arange(config.num_experts, device=ids_TK.device)).sum(dim=(0, 1))
            balance = (chosen_E.to(probs_TE.dtype) / ids_TK.numel() * probs_TE.mean(dim=0)).sum()
            loss = loss + config.router_switch_weight * config.num_experts * balance
        if config.router_z_weight:
            loss = loss + config.router_z_weight * logits_TE.logsumexp(dim=-1).square().mean()
        return loss


def _squared_cv(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation: population variance over mean^2."""
    return values_E.var(correction=0) / values_E.mean().square()


__all__ = ["VMoERouter"]

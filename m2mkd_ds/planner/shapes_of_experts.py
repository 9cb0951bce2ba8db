"""Experts on the meta device: the layer's own code on rows that are dealt as told, with all experts or a rank's share of them.

Backends read on the host how many rows each expert has, which the meta device cannot tell. Here the first expert has `imbalance` times
the mean and the others equal rests; a rank that holds a share of the experts holds the first one, so it is the fullest rank. The exchange
of expert parallelism is replaced by buffers of the size that it would fill. Shape letters: T tokens, K choices a token, R rows of this
rank, S rows that arrive (R, when routing is even), E experts, P ranks that share them, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.moe.backends import BACKENDS, Backend, ExpertWeights
from m2mkd_ds.moe.dispatch import DispatchPlan, combine, permute
from m2mkd_ds.moe.experts import Experts


def prepare_experts_(module: nn.Module, backend: str, ep_size: int, imbalance: float = 1.0, arriving: float = 0.0) -> None:
    """Swap every `Experts` of `module`, in place, for one that runs on the meta device with `backend` and E / ep_size experts.

    Raises ValueError when ep_size does not divide the experts.
    """
    layers = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children() if isinstance(child, Experts)]
    for parent, name, experts in layers:
        num_experts = experts.down_proj.shape[0]
        if num_experts % ep_size:
            raise ValueError(f"{num_experts} experts cannot be spread over ep_size {ep_size} ranks; choose a divisor")
        setattr(parent, name, (ShapedExperts if ep_size == 1 else SharedExperts)(experts, backend, ep_size, imbalance, arriving))


class ShapedExperts(Experts):
    """All experts."""

    def __init__(self, experts: Experts, backend: str, ep_size: int, imbalance: float, arriving: float = 0.0) -> None:
        """`arriving`: rows that the fullest rank computes over those that it sends, S / R; 0: it follows from the busiest expert."""
        nn.Module.__init__(self)
        self.backend, self.activation = backend, experts.activation
        self.num_experts, self.ep_size = experts.down_proj.shape[0], ep_size
        self.imbalance = min(max(imbalance, 1.0), float(self.num_experts))
        self.arriving = arriving
        for name, full in experts.named_parameters():
            share = torch.empty(full.shape[0] // ep_size, *full.shape[1:], dtype=full.dtype, device="meta")
            setattr(self, name, nn.Parameter(share, requires_grad=full.requires_grad))

    def prepare(self, x_TD: Tensor) -> tuple[Tensor, ExpertWeights, Backend]:
        """As in the layer, without autocast, which the meta device does not know and no phase uses."""
        weights = ExpertWeights(self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias, self.activation)
        return x_TD, weights, BACKENDS[self.backend]

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens [T, D] -> [T, D]."""
        num_rows = plan.order_R.shape[0]
        return super().forward(x_TD, weights_TK, replace(plan, offsets_E=self.ends(num_rows)))

    def ends(self, num_rows: int) -> Tensor:
        """int32 [E / P] on the CPU, where backends can read it: the end of each local expert's rows, of R = `num_rows` a rank."""
        mean = num_rows * self.ep_size / self.num_experts
        rest = mean * (self.num_experts - self.imbalance) / max(self.num_experts - 1, 1)
        local = self.num_experts // self.ep_size
        first = self.imbalance * mean
        if self.arriving and self.ep_size > 1:
            first = min(first, num_rows * self.arriving)
            rest = (num_rows * self.arriving - first) / max(local - 1, 1)
        return torch.tensor([round(first + rest * e) for e in range(local)], dtype=torch.int32)


class SharedExperts(ShapedExperts):
    """This rank's share of the experts, with the buffers of both exchanges."""

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens [T, D] -> [T, D]; the steps are those of distributed.expert_parallel."""
        x_TD, weights, backend = self.prepare(x_TD)
        rows_RD = permute(x_TD, plan)
        num_rows, ends_E = rows_RD.shape[0], self.ends(rows_RD.shape[0])
        num_arriving = int(ends_E[-1])
        order_S, arrived_S = (torch.empty(num_arriving, dtype=torch.int64, device="meta") for _ in range(2))
        sorted_SD = _Moved.apply(_Moved.apply(rows_RD, num_arriving, None), num_arriving, arrived_S)
        computed_SD = backend.run(sorted_SD, ends_E, weights)
        back_SD = _Moved.apply(computed_SD, num_arriving, order_S)
        return combine(_Moved.apply(back_SD, num_rows, None), weights_TK, plan)


class _Moved(torch.autograd.Function):
    """Rows in another place (exchanged, or in another order): a new buffer in either direction."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, num_out: int, kept_S: Tensor | None) -> Tensor:
        ctx.num_in = rows_RD.shape[0]
        ctx.kept_S = kept_S  # the order that the way back needs
        return rows_RD.new_empty(num_out, rows_RD.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].new_empty(ctx.num_in, grads[0].shape[1]), None, None

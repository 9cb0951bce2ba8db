"""Experts on the meta device: the layer's own code on rows that are dealt evenly, with all experts or a rank's share of them.

Backends read on the host how many rows each expert has, which the meta device cannot tell; here every expert has as many. With expert
parallelism the exchange is replaced by buffers of the size that it would fill. Shape letters: T tokens, K choices a token, R rows of
this rank, S rows that arrive (as many, when routing is even), E experts, P ranks that share them, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.moe.backends import BACKENDS, Backend, ExpertWeights
from m2mkd_ds.moe.dispatch import DispatchPlan, combine, permute
from m2mkd_ds.moe.experts import Experts


def prepare_experts_(module: nn.Module, backend: str, ep_size: int) -> None:
    """Swap every `Experts` of `module`, in place, for one that runs on the meta device with `backend` and E / ep_size experts.

    Raises ValueError when ep_size does not divide the experts.
    """
    layers = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children() if isinstance(child, Experts)]
    for parent, name, experts in layers:
        num_experts = experts.down_proj.shape[0]
        if num_experts % ep_size:
            raise ValueError(f"{num_experts} experts cannot be spread over ep_size {ep_size} ranks; choose a divisor")
        setattr(parent, name, EvenExperts(experts, backend) if ep_size == 1 else SharedEvenExperts(experts, backend, ep_size))


class EvenExperts(Experts):
    """All experts, each with R / E rows."""

    def __init__(self, experts: Experts, backend: str, ep_size: int = 1) -> None:
        nn.Module.__init__(self)
        self.backend, self.activation = backend, experts.activation
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
        return super().forward(x_TD, weights_TK, replace(plan, offsets_E=_even_ends(num_rows, self.down_proj.shape[0])))


class SharedEvenExperts(EvenExperts):
    """This rank's share of the experts, with the buffers of both exchanges."""

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens [T, D] -> [T, D]; the steps are those of distributed.expert_parallel."""
        x_TD, weights, backend = self.prepare(x_TD)
        rows_RD = permute(x_TD, plan)
        num_rows = rows_RD.shape[0]
        order_S, arrived_S = (torch.empty(num_rows, dtype=torch.int64, device="meta") for _ in range(2))
        sorted_SD = _Moved.apply(_Moved.apply(rows_RD, None), arrived_S)
        computed_SD = backend.run(sorted_SD, _even_ends(num_rows, weights.num_experts), weights)
        back_RD = _Moved.apply(_Moved.apply(computed_SD, order_S), None)
        return combine(back_RD, weights_TK, plan)


class _Moved(torch.autograd.Function):
    """Rows in another place (exchanged, or in another order): a buffer of the same shape in either direction."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, kept_R: Tensor | None) -> Tensor:
        ctx.kept_R = kept_R  # the order that the way back needs
        return torch.empty_like(rows_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(grads[0]), None


def _even_ends(num_rows: int, num_experts: int) -> Tensor:
    """int32 [E] on the CPU, where backends can read it: the end of each expert's rows."""
    return torch.tensor([num_rows * (e + 1) // num_experts for e in range(num_experts)], dtype=torch.int32)

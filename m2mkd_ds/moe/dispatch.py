"""Dispatch and combine: tokens to rows grouped by expert, and back as a weighted sum. Deterministic forward and backward.

    plan = make_plan(expert_ids_TK, E); rows_RD = permute(x_TD, plan); ... ; y_TD = combine(rows_RD, weights_TK, plan)

Every (token, choice) is exactly one row, so row order is a permutation of T*K and both directions are pure gathers: no
index_add, no atomics, no host sync. Shape letters: T tokens, K choices a token, R = T*K rows, E experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Where each (token, choice) sits among the rows; built once per layer and forward pass."""

    order_R: Tensor
    """int64: row -> flat index token*K + choice; rows are sorted by expert, stable, so by token inside an expert."""
    rows_TK: Tensor
    """int64: (token, choice) -> row; the inverse of order_R."""
    offsets_E: Tensor
    """int32: end of each expert's rows; expert e owns rows offsets[e-1]..offsets[e]-1, and offsets[E-1] = R."""


def make_plan(expert_ids_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Sort T*K choices by expert. `expert_ids_TK`: int64 in [0, E) (not checked: that would wait for the GPU)."""
    num_tokens, top_k = expert_ids_TK.shape
    sorted_R, order_R = expert_ids_TK.reshape(-1).sort(stable=True)
    rows_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))
    experts_E = torch.arange(num_experts, device=order_R.device)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True).to(torch.int32)
    return DispatchPlan(order_R, rows_R.view(num_tokens, top_k), offsets_E)


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token to its K rows: [T, D] -> [R, D] contiguous, same dtype."""
    return _Permute.apply(x_TD, plan.order_R, plan.rows_TK)


def combine(rows_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Weighted sum of each token's K rows: [R, D], [T, K] -> [T, D] in the dtype of the rows.

    Products and sum are in the weights' dtype (fp32 by the router's contract), choice 0 first.
    """
    rows_TKD = _Unpermute.apply(rows_RD, plan.order_R, plan.rows_TK)
    total_TD = rows_TKD[:, 0] * weights_TK[:, 0, None]
    for k in range(1, weights_TK.shape[1]):
        total_TD = total_TD + rows_TKD[:, k] * weights_TK[:, k, None]
    return total_TD.to(rows_RD.dtype)


class _Permute(torch.autograd.Function):
    """Gather whose gradient is a gather and a sum over K in fixed order (autograd's own would be an atomic index_add)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return x_TD.index_select(0, order_R // rows_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        grad_RD = grads[0]
        # Summed in fp32 so that bf16 does not round after every choice.
        total_TD = grad_RD.index_select(0, rows_TK[:, 0]).to(torch.promote_types(grad_RD.dtype, torch.float32))
        for k in range(1, rows_TK.shape[1]):
            total_TD = total_TD + grad_RD.index_select(0, rows_TK[:, k])
        return total_TD.to(grad_RD.dtype), None, None


class _Unpermute(torch.autograd.Function):
    """[R, D] -> [T, K, D], a permutation of rows; its gradient is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return rows_RD.index_select(0, rows_TK.reshape(-1)).view(*rows_TK.shape, rows_RD.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, order_R), None, None

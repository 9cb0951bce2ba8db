"""Dispatch and combine: tokens to rows grouped by expert, and back as a weighted sum. Deterministic forward and backward.

    plan = make_plan(expert_ids_TK, E); rows_RD = permute(x_TD, plan); ... ; y_TD = combine(rows_RD, weights_TK, plan)

A (token, choice) is one row, or none (dropped for capacity, or a slot that the router did not use), so both directions are pure
gathers: no index_add, no atomics, no host sync. Shape letters: T tokens, K choices a token, R rows, E experts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Where each (token, choice) sits among the rows; built once per layer and forward pass.

    Rows at and beyond offsets_E[-1] belong to nobody: they hold some token's values or, behind a backend, anything.
    """

    order_R: Tensor
    """int64: row -> flat index token*K + choice; rows are sorted by expert, stable, so by token inside an expert."""
    rows_TK: Tensor
    """int64: (token, choice) -> row; 0 for a choice without a row."""
    offsets_E: Tensor
    """int32: end of each expert's rows; expert e owns rows offsets[e-1]..offsets[e]-1."""
    kept_TK: Tensor | None
    """bool: whether the choice has a row; None when every one has, so that nothing needs masking."""

    def row_tokens(self) -> Tensor:
        """int64 [R]: row -> token."""
        return self.order_R // self.rows_TK.shape[1]


def make_plan(expert_ids_TK: Tensor, num_experts: int, max_rows: int | None = None) -> DispatchPlan:
    """Sort T*K choices by expert.

    `expert_ids_TK`: int64 in [0, E), and with `max_rows` also E for "no expert". `max_rows` is R, an upper bound, known without
    looking at the data, on how many choices have an expert. (Values are not checked: that would wait for the GPU.)
    """
    num_tokens, top_k = expert_ids_TK.shape
    sorted_N, order_N = expert_ids_TK.reshape(-1).sort(stable=True)
    rows_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(order_N.numel(), device=order_N.device))
    experts_E = torch.arange(num_experts, device=order_N.device)
    offsets_E = torch.searchsorted(sorted_N, experts_E, right=True).to(torch.int32)
    rows_TK = rows_N.view(num_tokens, top_k)
    if max_rows is None:
        return DispatchPlan(order_N, rows_TK, offsets_E, kept_TK=None)
    kept_TK = expert_ids_TK < num_experts
    return DispatchPlan(order_N[:max_rows], torch.where(kept_TK, rows_TK, 0), offsets_E, kept_TK)


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token to its rows: [T, D] -> [R, D] contiguous, same dtype."""
    return _Permute.apply(x_TD, plan)


def combine(rows_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Weighted sum of each token's rows: [R, D], [T, K] -> [T, D] in the dtype of the rows; zeros for a token without rows.

    Products and sum are in the weights' dtype (fp32 by the router's contract), choice 0 first.
    """
    rows_TKD = _Unpermute.apply(rows_RD, plan)
    total_TD = rows_TKD[:, 0] * weights_TK[:, 0, None]
    for k in range(1, weights_TK.shape[1]):
        total_TD = total_TD + rows_TKD[:, k] * weights_TK[:, k, None]
    return total_TD.to(rows_RD.dtype)


class _Permute(torch.autograd.Function):
    """Gather whose gradient is a gather and a sum over K in fixed order (autograd's own would be an atomic index_add)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.row_tokens())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        plan: DispatchPlan = ctx.plan
        grad_RD = grads[0]
        num_tokens, top_k = plan.rows_TK.shape
        # Summed in fp32 so that bf16 does not round after every choice.
        total_TD = grad_RD.new_zeros(num_tokens, grad_RD.shape[1], dtype=torch.promote_types(grad_RD.dtype, torch.float32))
        for k in range(top_k):
            total_TD = total_TD + _masked(grad_RD.index_select(0, plan.rows_TK[:, k]), plan, k)
        return total_TD.to(grad_RD.dtype), None


class _Unpermute(torch.autograd.Function):
    """[R, D] -> [T, K, D], a gather that no two choices share a row in; its gradient is the gather the other way."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        num_tokens, top_k = plan.rows_TK.shape
        rows_TKD = rows_RD.index_select(0, plan.rows_TK.reshape(-1)).view(num_tokens, top_k, rows_RD.shape[1])
        # A mask, not a zero weight: rows of nobody may hold NaN, and 0 * NaN is NaN.
        return rows_TKD if plan.kept_TK is None else torch.where(plan.kept_TK[..., None], rows_TKD, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        plan: DispatchPlan = ctx.plan
        return grads[0].flatten(0, 1).index_select(0, plan.order_R), None


def _masked(rows_TD: Tensor, plan: DispatchPlan, k: int) -> Tensor:
    """Zero where choice k of a token has no row."""
    return rows_TD if plan.kept_TK is None else torch.where(plan.kept_TK[:, k, None], rows_TD, 0)

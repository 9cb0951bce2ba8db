"""Dispatch and combine: tokens to rows grouped by expert, and back as a weighted sum. Deterministic forward and backward.

    plan = make_plan(expert_ids_TK, E); rows_RD = permute(x_TD, plan); ... ; y_TD = combine(rows_RD, weights_TK, plan)

A (token, choice) is one row, or none (dropped for capacity, or a slot that the router did not use), so both directions are pure
gathers: no index_add, no atomics, no host sync. Shape letters: T tokens, K choices a token, R rows, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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

    Products and sum are in the weights' dtype (fp32 by the router's contract), choice 0 first. Differentiable once.
    """
    return _Combine.apply(rows_RD, weights_TK, plan)


def weighted_sum(rows_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """`combine` without autograd, for backends that bring their own backward pass."""
    total_TD = rows_RD.new_zeros(weights_TK.shape[0], rows_RD.shape[1], dtype=weights_TK.dtype)
    term_TD = torch.empty_like(total_TD)
    for k, choice_TD in _choices(rows_RD, plan):
        # Product and sum in two steps, not addcmul, which rounds once where the exported model's plain code rounds twice.
        total_TD.add_(torch.mul(choice_TD, weights_TK[:, k, None], out=term_TD))
    return total_TD.to(rows_RD.dtype)


def sum_choices(rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum of each token's rows, in at least fp32 so that bf16 does not round after every choice: [R, D] -> [T, D]. No autograd."""
    dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    total_TD = rows_RD.new_zeros(plan.rows_TK.shape[0], rows_RD.shape[1], dtype=dtype)
    for _, choice_TD in _choices(rows_RD, plan):
        total_TD.add_(choice_TD)
    return total_TD.to(rows_RD.dtype)


def gather_choices(values_R: Tensor, plan: DispatchPlan) -> Tensor:
    """One number a row -> one a choice, [R] -> [T, K]; zero for a choice without a row. No autograd."""
    if not values_R.shape[0]:
        return values_R.new_zeros(plan.rows_TK.shape)
    values_TK = values_R[plan.rows_TK]
    return values_TK if plan.kept_TK is None else values_TK.masked_fill_(~plan.kept_TK, 0)


def row_dots(a_ND: Tensor, b_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """Scalar product of each pair of rows, multiplied and summed in `dtype`: [N, D], [N, D] -> [N]."""
    return torch.linalg.vecdot(a_ND.to(dtype), b_ND.to(dtype))


def _choices(rows_RD: Tensor, plan: DispatchPlan) -> Iterator[tuple[int, Tensor]]:
    """(k, rows of all tokens' choice k [T, D]) for k = 0..K-1, zeros where a choice has no row. The buffer is used again.

    Zeros, not a zero weight: rows of nobody may hold NaN, and 0 * NaN is NaN.
    """
    num_tokens, top_k = plan.rows_TK.shape
    if not rows_RD.shape[0]:
        return  # no choice has a row, and there is no row 0 to read in its place
    choice_TD = rows_RD.new_empty(num_tokens, rows_RD.shape[1])
    for k in range(top_k):
        torch.index_select(rows_RD, 0, plan.rows_TK[:, k], out=choice_TD)
        if plan.kept_TK is not None:
            choice_TD.masked_fill_(~plan.kept_TK[:, k, None], 0)
        yield k, choice_TD


class _Permute(torch.autograd.Function):
    """Gather whose gradient is a gather and a sum over K in fixed order (autograd's own would be an atomic index_add)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.row_tokens())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_choices(grads[0], ctx.plan), None


class _Combine(torch.autograd.Function):
    """Saves the rows and the weights; makes no [T, K, D] tensor in either direction."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK)
        ctx.plan = plan
        return weighted_sum(rows_RD, weights_TK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RD, weights_TK = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        grad_TD = grads[0]
        grad_rows_RD = grad_weights_TK = None
        if ctx.needs_input_grad[0]:
            grad_rows_RD = grad_TD.index_select(0, plan.row_tokens())
            torch.mul(grad_rows_RD, weights_TK.reshape(-1).index_select(0, plan.order_R)[:, None], out=grad_rows_RD)
        if ctx.needs_input_grad[1]:
            grad_weights_TK = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
            for k, choice_TD in _choices(rows_RD, plan):
                grad_weights_TK[:, k] = row_dots(choice_TD, grad_TD, weights_TK.dtype)
        return grad_rows_RD, grad_weights_TK, None

"""Combine with autograd: y[t] = sum over kept choices of weights[t, k] * rows[rows[t, k]], in fp32, deterministic.

Shape letters: T tokens, K choices a token, R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m2mkd_kernels.combine.launch import combine_backward, contiguous_weights, sum_choices
from m2mkd_kernels.gather import Gather
from m2mkd_kernels.runtime import eager_only, first_order_only, row_major


@eager_only
def combine(rows_RD: Tensor, weights_TK: Tensor, gather: Gather) -> Tensor:
    """[R, D], fp32 [T, K] -> [T, D] in the dtype of the rows; zeros for a token without rows.

    Rows that no choice names are not read and get an unspecified gradient. Raises ValueError for wrong shapes and dtypes.
    """
    return _Combine.apply(rows_RD, weights_TK, *gather)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, order_R: Tensor, rows_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        gather = Gather(order_R, rows_TK, kept_TK)
        rows_RD, weights_TK = row_major(rows_RD), contiguous_weights(weights_TK, gather)
        ctx.save_for_backward(rows_RD, weights_TK, *gather)
        return sum_choices(rows_RD, weights_TK, gather)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows_RD, weights_TK, *plan = ctx.saved_tensors
        want_rows, want_weights = ctx.needs_input_grad[:2]
        drows_RD, dweights_TK = combine_backward(
            row_major(grad_TD), rows_RD, weights_TK, Gather(*plan), want_rows=want_rows, want_weights=want_weights
        )
        return drows_RD, dweights_TK, None, None, None

"""Triton kernel of the routing weights' gradient, from pieces that the backward of the experts leaves behind."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from m2mkd_kernels.combine.kernel import choice_rows


@triton.jit(do_not_specialize=["num_tokens"])
def routing_grad_kernel(
    row_dots_ptr, grad_ptr, bias_ptr, rows_ptr, kept_ptr, ends_ptr, out_ptr, num_tokens, num_groups, num_parts, D, stride_grad,
    K: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """out[t, k] = sum of row_dots[row] + <grad[t], bias[group of the row]>, which is <grad[t], output row>: the row itself is not needed.

    <grad, W h + b> = <W^T grad, h> + <grad, b>, and the first term was left by `act_grad_kernel`, a number per tile of columns.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    groups = tl.arange(0, BLOCK_G)
    parts = tl.arange(0, BLOCK_P)
    # Padded groups end beyond every row, so they are never counted.
    ends = tl.load(ends_ptr + groups, mask=groups < num_groups, other=2147483647)
    for k in range(K):
        choices = tokens.to(tl.int64) * K + k
        rows, counts = choice_rows(rows_ptr, kept_ptr, choices, tokens < num_tokens, HAS_KEPT)
        row_groups = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), 1)
        dots_mask = counts[:, None] & (parts < num_parts)[None, :]
        total = tl.sum(tl.load(row_dots_ptr + rows[:, None] * num_parts + parts[None, :], mask=dots_mask, other=0.0), 1)
        products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = counts[:, None] & (columns < D)[None, :]
            grad = tl.load(grad_ptr + tokens.to(tl.int64)[:, None] * stride_grad + columns[None, :], mask=inside, other=0.0)
            bias = tl.load(bias_ptr + row_groups.to(tl.int64)[:, None] * D + columns[None, :], mask=inside, other=0.0)
            products += grad.to(tl.float32) * bias.to(tl.float32)
        tl.store(out_ptr + choices, total + tl.sum(products, 1), mask=tokens < num_tokens)

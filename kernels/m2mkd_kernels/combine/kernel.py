"""Triton kernels of combine and of its backward. A row belongs to one choice at most, so nothing is added by two programs.

Shape letters: T tokens, K choices a token, R rows, D width.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choice_rows(rows_ptr, kept_ptr, choices, inside, HAS_KEPT: tl.constexpr):
    """(rows, which of them count) of the given flat choices."""
    rows = tl.load(rows_ptr + choices, mask=inside, other=0)
    if HAS_KEPT:
        inside = inside & (tl.load(kept_ptr + choices, mask=inside, other=0) != 0)
    return rows, inside


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    x_ptr, weights_ptr, rows_ptr, kept_ptr, out_ptr, num_tokens, D, stride_x,
    K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k weights[t, k] * x[rows[t, k]] in fp32, choice 0 first; without weights the plain sum."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(K):
        choices = tokens.to(tl.int64) * K + k
        rows, counts = choice_rows(rows_ptr, kept_ptr, choices, tokens < num_tokens, HAS_KEPT)
        x_ptrs = x_ptr + rows[:, None] * stride_x + columns[None, :]
        x = tl.load(x_ptrs, mask=counts[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            x *= tl.load(weights_ptr + choices, mask=counts, other=0.0)[:, None]
        total += x
    inside = (tokens < num_tokens)[:, None] & (columns < D)[None, :]
    tl.store(out_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_backward_kernel(
    grad_ptr, x_ptr, weights_ptr, rows_ptr, kept_ptr, dx_ptr, dweights_ptr, num_tokens, D, stride_grad, stride_x,
    K: tl.constexpr, HAS_KEPT: tl.constexpr, STORE_DX: tl.constexpr, STORE_DWEIGHTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx[rows[t, k]] = weights[t, k] * grad[t]; dweights[t, k] = <grad[t], x[rows[t, k]]> in fp32."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    grad_rows = grad_ptr + tokens.to(tl.int64)[:, None] * stride_grad
    for k in range(K):
        choices = tokens.to(tl.int64) * K + k
        rows, counts = choice_rows(rows_ptr, kept_ptr, choices, tokens < num_tokens, HAS_KEPT)
        weights = tl.load(weights_ptr + choices, mask=counts, other=0.0)
        products = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for first in range(0, D, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = counts[:, None] & (columns < D)[None, :]
            grad = tl.load(grad_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if STORE_DX:
                dx = grad * weights[:, None]
                tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if STORE_DWEIGHTS:
                x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)
                products += grad * x.to(tl.float32)
        if STORE_DWEIGHTS:
            tl.store(dweights_ptr + choices, tl.sum(products, 1), mask=tokens < num_tokens)

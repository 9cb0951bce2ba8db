"""Triton kernel that copies tokens to their rows. (Its backward is combine's sum without weights.)"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def permute_kernel(
    x_ptr, order_ptr, out_ptr, num_rows, D, stride_x, DIVISOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out[row] = x[order[row] // DIVISOR]."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tokens = tl.load(order_ptr + rows, mask=rows < num_rows, other=0) // DIVISOR
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    values = tl.load(x_ptr + tokens[:, None] * stride_x + columns[None, :], mask=inside)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], values, mask=inside)

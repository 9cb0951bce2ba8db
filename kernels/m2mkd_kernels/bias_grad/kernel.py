"""Triton kernels of the bias gradient, in two steps of fixed order instead of atomics: sums over row tiles, then over a group's tiles.

Shape letters: R rows, G groups, O width.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from m2mkd_kernels.tiling import find_tile, source_rows, tiles_of_group


@triton.jit
def sum_rows_kernel(
    grad_ptr, index_ptr, scale_ptr, ends_ptr, sums_ptr, num_groups, width, stride_grad,
    GATHER: tl.constexpr, DIVISOR: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """sums[tile] = sum over the tile's rows of scale[index[row]] * grad[index[row] // DIVISOR]."""
    tile = tl.program_id(0)
    group, first_row, end = find_tile(ends_ptr, tile, num_groups, BLOCK_M, BLOCK_G)
    if group >= num_groups:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    rows_read = tl.minimum(rows, end - 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    sources = source_rows(index_ptr, rows_read, GATHER, DIVISOR)
    values = tl.load(grad_ptr + sources[:, None] * stride_grad + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        values *= tl.load(scale_ptr + tl.load(index_ptr + rows_read))[:, None]
    tl.store(sums_ptr + tile.to(tl.int64) * width + columns, tl.sum(values, 0), mask=columns < width)


@triton.jit
def sum_tiles_kernel(
    sums_ptr, ends_ptr, out_ptr, num_groups, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """out[group] = sum over the group's row tiles of sums[tile]; zeros without tiles. BLOCK_M is that of the kernel that wrote `sums`.

    Tile i of the group is added to partial sum i % BLOCK_TILES, so that as many loads are under way at a time; then those are summed.
    """
    group = tl.program_id(0)
    first, num_tiles = tiles_of_group(ends_ptr, group, num_groups, BLOCK_M, BLOCK_G)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.arange(0, BLOCK_TILES)
    total = tl.zeros((BLOCK_TILES, BLOCK_N), tl.float32)
    sums_ptrs = sums_ptr + (first + tiles).to(tl.int64)[:, None] * width + columns[None, :]
    for done in range(0, num_tiles, BLOCK_TILES):
        total += tl.load(sums_ptrs, mask=(tiles < num_tiles - done)[:, None] & (columns < width)[None, :], other=0.0)
        sums_ptrs += BLOCK_TILES * width
    sums = tl.sum(total, 0)
    tl.store(out_ptr + group.to(tl.int64) * width + columns, sums.to(out_ptr.dtype.element_ty), mask=columns < width)

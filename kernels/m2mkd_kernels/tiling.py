"""Triton functions shared by the kernels: which rows a program owns, and the products of a tile of rows.

Everything is found on the device from the end offsets, so the host never waits to learn how many rows a group has: the grid
has cdiv(R, BLOCK_M) + G row tiles, an upper bound for any split, and programs without a tile leave at once.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(ends_ptr, tile, num_groups, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(group, first row, end of the group) of row tile number `tile`; group >= num_groups if there is no such tile.

    Tiles are numbered through the groups, and none spans two of them.
    """
    groups = tl.arange(0, BLOCK_G)
    inside = groups < num_groups
    ends = tl.load(ends_ptr + groups, mask=inside, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=inside & (groups > 0), other=0)
    num_tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last_tiles = tl.cumsum(num_tiles, 0)
    group = tl.sum((last_tiles <= tile).to(tl.int32), 0)
    here = groups == group
    start = tl.sum(tl.where(here, starts, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    first_tile = tl.sum(tl.where(here, last_tiles - num_tiles, 0), 0)
    return group, start + (tile - first_tile) * BLOCK_M, end


@triton.jit
def tiles_of_group(ends_ptr, group, num_groups, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(first, number) of the group's row tiles, in the numbering of `find_tile`."""
    groups = tl.arange(0, BLOCK_G)
    inside = groups < num_groups
    ends = tl.load(ends_ptr + groups, mask=inside, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=inside & (groups > 0), other=0)
    num_tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(groups < group, num_tiles, 0), 0)
    return first, tl.sum(tl.where(groups == group, num_tiles, 0), 0)


@triton.jit
def nth_largest_group(ends_ptr, rank, num_groups, BLOCK_G: tl.constexpr):
    """(group, start, end) of the group with the `rank`-th most rows; among equals the lower number first.

    Programs of the largest group start first, so that the longest loops do not begin when the others end. Above 64 groups, whose
    comparison would fill the registers, simply the group of that number.
    """
    groups = tl.arange(0, BLOCK_G)
    inside = groups < num_groups
    ends = tl.load(ends_ptr + groups, mask=inside, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=inside & (groups > 0), other=0)
    if BLOCK_G <= 64:
        sizes = tl.where(inside, ends - starts, -1)
        before = (sizes[None, :] > sizes[:, None]) | ((sizes[None, :] == sizes[:, None]) & (groups[None, :] < groups[:, None]))
        here = tl.sum(before.to(tl.int32), 1) == rank
    else:
        here = groups == rank
    group = tl.sum(tl.where(here, groups, 0), 0)
    return group, tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def swizzle(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(row tile, column tile): GROUP_M row tiles share each panel of the weight while it is in the L2 cache."""
    width = GROUP_M * num_n
    first = (pid // width) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    return first + (pid % width) % height, (pid % width) // height


@triton.jit
def source_rows(index_ptr, rows, GATHER: tl.constexpr, DIVISOR: tl.constexpr):
    """int64 numbers of the rows to read: index[row] // DIVISOR, or the row itself."""
    if GATHER:
        return tl.load(index_ptr + rows) // DIVISOR
    else:
        return rows.to(tl.int64)


@triton.jit
def tile_offsets(stride, columns, BLOCK_M: tl.constexpr):
    """int32 offsets of a tile from its first row, whose own offset is int64: half the registers of int64 everywhere."""
    return tl.arange(0, BLOCK_M)[:, None] * stride + columns[None, :]


@triton.jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of the columns, so that an epilogue holds half as many values in registers at a time."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def load_tile(ptrs, mask, EVEN: tl.constexpr):
    """A tile, zero outside of the mask; EVEN says that the mask is full."""
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rows_times_matrix(
    row_ptrs, matrix_ptr, columns, K, N, stride_k, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] fp32: the rows times matrix[k, n] for the given columns.

    Rows need no mask: those beyond the end of the group repeat its last row, and their results are not stored.
    """
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = row_ptrs[:, None] + ks[None, :]
    b_ptrs = matrix_ptr + ks[:, None] * stride_k + columns[None, :] * stride_n
    inside_n = columns[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = load_tile(a_ptrs, ks[None, :] < K - k, EVEN_K)
        b = load_tile(b_ptrs, (ks[:, None] < K - k) & inside_n, EVEN_K and EVEN_N)
        acc = dot(a, b, acc, PRECISION, UPCAST)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_k
    return acc


@triton.jit
def rows_times_two_matrices(
    row_ptrs, first_ptr, second_ptr, columns, K, N, stride_k, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`rows_times_matrix` for two matrices of the same layout; the rows are loaded once."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = row_ptrs[:, None] + ks[None, :]
    b_offsets = ks[:, None] * stride_k + columns[None, :] * stride_n
    first_ptrs = first_ptr + b_offsets
    second_ptrs = second_ptr + b_offsets
    inside_n = columns[None, :] < N
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = load_tile(a_ptrs, ks[None, :] < K - k, EVEN_K)
        inside = (ks[:, None] < K - k) & inside_n
        first = dot(a, load_tile(first_ptrs, inside, EVEN_K and EVEN_N), first, PRECISION, UPCAST)
        second = dot(a, load_tile(second_ptrs, inside, EVEN_K and EVEN_N), second, PRECISION, UPCAST)
        a_ptrs += BLOCK_K
        first_ptrs += BLOCK_K * stride_k
        second_ptrs += BLOCK_K * stride_k
    return first, second

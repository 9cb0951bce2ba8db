"""Triton kernels of the grouped GEMM: rows times their group's matrix, its backward through the activation, weight gradient.

Shape letters: R rows, G groups, M rows of a tile, K the summed width, N the width of the output, O and I of a weight [G, O, I].
Rows at and beyond the last end offset are neither read nor written.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from m2mkd_kernels.tiling import (
    dot,
    find_tile,
    halves,
    nth_largest_group,
    rows_times_matrix,
    rows_times_two_matrices,
    source_rows,
    swizzle,
    tile_offsets,
)  # fmt: skip

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def normal_cdf_pdf(z, FAST_ERF: tl.constexpr):
    """Distribution and density of the standard normal: gelu(z) = z * cdf, gelu'(z) = cdf + z * pdf.

    FAST_ERF, for 16-bit results: Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7) in the form of erfc, which shares its
    exponential with the density, takes fewer instructions and keeps the tail from cancelling.
    """
    exponential = tl.exp(-0.5 * z * z)
    if FAST_ERF:
        t = 1.0 / (1.0 + (0.3275911 * SQRT_HALF) * tl.abs(z))
        poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * exponential * poly
        cdf = tl.where(z < 0, tail, 1.0 - tail)
    else:
        cdf = 0.5 + 0.5 * tl.erf(z * SQRT_HALF)
    return cdf, INV_SQRT_2PI * exponential


@triton.jit(do_not_specialize=["num_m"])
def gemm_kernel(
    x_ptr, index_ptr, weight_ptr, bias_ptr, ends_ptr, z_ptr, h_ptr,
    num_groups, num_m, K, N, stride_x, stride_g, stride_k, stride_n, stride_z, stride_h, stride_bias,
    ACTIVATION: tl.constexpr, GATHER: tl.constexpr, DIVISOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, STORE_Z: tl.constexpr, STORE_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FAST_ERF: tl.constexpr,
):  # fmt: skip
    """z = x[index] @ matrix[group] + bias[group]; h = activation(z). For swiglu N is the width of h, z is 2N wide, gate first."""
    num_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = swizzle(tl.program_id(0), num_m, num_n, GROUP_M)
    group, first_row, end = find_tile(ends_ptr, tile_m, num_groups, BLOCK_M, BLOCK_G)
    if group >= num_groups:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    first_column = tile_n * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    row_ptrs = x_ptr + source_rows(index_ptr, tl.minimum(rows, end - 1), GATHER, DIVISOR) * stride_x
    matrix_ptr = weight_ptr + group.to(tl.int64) * stride_g
    group_bias_ptr = bias_ptr + group.to(tl.int64) * stride_bias
    z_tile_ptr = z_ptr + first_row.to(tl.int64) * stride_z
    h_tile_ptr = h_ptr + first_row.to(tl.int64) * stride_h
    num_rows = end - first_row
    HALF: tl.constexpr = BLOCK_N // 2
    if ACTIVATION == "swiglu":
        gate, value = rows_times_two_matrices(
            row_ptrs, matrix_ptr, matrix_ptr + N * stride_n, columns, K, N, stride_k, stride_n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, PRECISION, UPCAST,
        )  # fmt: skip
        gate_left, gate_right = halves(gate, BLOCK_M, BLOCK_N)
        value_left, value_right = halves(value, BLOCK_M, BLOCK_N)
        store_swiglu(
            gate_left, value_left, group_bias_ptr, z_tile_ptr, h_tile_ptr, first_column, num_rows, N, stride_z, stride_h,
            HAS_BIAS, STORE_Z, STORE_H, BLOCK_M, HALF,
        )  # fmt: skip
        store_swiglu(
            gate_right, value_right, group_bias_ptr, z_tile_ptr, h_tile_ptr, first_column + HALF, num_rows, N, stride_z, stride_h,
            HAS_BIAS, STORE_Z, STORE_H, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        z = rows_times_matrix(
            row_ptrs, matrix_ptr, columns, K, N, stride_k, stride_n,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, PRECISION, UPCAST,
        )  # fmt: skip
        left, right = halves(z, BLOCK_M, BLOCK_N)
        store_gelu(
            left, group_bias_ptr, z_tile_ptr, h_tile_ptr, first_column, num_rows, N, stride_z, stride_h,
            HAS_BIAS, STORE_Z, STORE_H, FAST_ERF, BLOCK_M, HALF,
        )  # fmt: skip
        store_gelu(
            right, group_bias_ptr, z_tile_ptr, h_tile_ptr, first_column + HALF, num_rows, N, stride_z, stride_h,
            HAS_BIAS, STORE_Z, STORE_H, FAST_ERF, BLOCK_M, HALF,
        )  # fmt: skip


@triton.jit
def store_gelu(
    z, bias_ptr, z_ptr, h_ptr, first_column, num_rows, N, stride_z, stride_h,
    HAS_BIAS: tl.constexpr, STORE_Z: tl.constexpr, STORE_H: tl.constexpr, FAST_ERF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the bias to some columns of a tile, store them and their exact (erf) GELU."""
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (tl.arange(0, BLOCK_M) < num_rows)[:, None] & (columns < N)[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if STORE_Z:
        tl.store(z_ptr + tile_offsets(stride_z, columns, BLOCK_M), z.to(z_ptr.dtype.element_ty), mask=inside)
    if STORE_H:
        cdf, _ = normal_cdf_pdf(z, FAST_ERF)
        h = z * cdf
        tl.store(h_ptr + tile_offsets(stride_h, columns, BLOCK_M), h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_swiglu(
    gate, value, bias_ptr, z_ptr, h_ptr, first_column, num_rows, N, stride_z, stride_h,
    HAS_BIAS: tl.constexpr, STORE_Z: tl.constexpr, STORE_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the biases to some columns of gate and value, store them and silu(gate) * value."""
    columns = first_column + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    inside = (tl.arange(0, BLOCK_M) < num_rows)[:, None] & inside_n[None, :]
    if HAS_BIAS:
        gate += tl.load(bias_ptr + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        value += tl.load(bias_ptr + N + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if STORE_Z:
        z_ptrs = z_ptr + tile_offsets(stride_z, columns, BLOCK_M)
        tl.store(z_ptrs, gate.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(z_ptrs + N, value.to(z_ptr.dtype.element_ty), mask=inside)
    if STORE_H:
        h = gate * tl.sigmoid(gate) * value
        tl.store(h_ptr + tile_offsets(stride_h, columns, BLOCK_M), h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_m"])
def act_grad_kernel(
    grad_ptr, index_ptr, weight_ptr, ends_ptr, z_ptr, scale_ptr, dz_ptr, h_ptr, column_sums_ptr, row_dots_ptr,
    num_groups, num_m, K, N, stride_grad, stride_g, stride_k, stride_n, stride_z, stride_h,
    ACTIVATION: tl.constexpr, GATHER: tl.constexpr, DIVISOR: tl.constexpr, HAS_SCALE: tl.constexpr,
    STORE_H: tl.constexpr, SUM_COLUMNS: tl.constexpr, DOT_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, FAST_ERF: tl.constexpr,
):  # fmt: skip
    """dh = grad[index] @ matrix[group], from there in one pass, with s the row's scale (1 without):

    dz = s * dh * activation'(z); h = s * activation(z); column sums of dz over the tile; row dots <dh, activation(z)> over the tile.
    For swiglu z and dz are 2N wide.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = swizzle(tl.program_id(0), num_m, num_n, GROUP_M)
    group, first_row, end = find_tile(ends_ptr, tile_m, num_groups, BLOCK_M, BLOCK_G)
    if group >= num_groups:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    rows_read = tl.minimum(rows, end - 1)
    first_column = tile_n * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    row_ptrs = grad_ptr + source_rows(index_ptr, rows_read, GATHER, DIVISOR) * stride_grad
    dh = rows_times_matrix(
        row_ptrs, weight_ptr + group.to(tl.int64) * stride_g, columns, K, N, stride_k, stride_n,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, PRECISION, UPCAST,
    )  # fmt: skip
    if HAS_SCALE:
        scale = tl.load(scale_ptr + tl.load(index_ptr + rows_read))
    else:
        scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    z_tile_ptr = z_ptr + first_row.to(tl.int64) * stride_z
    dz_tile_ptr = dz_ptr + first_row.to(tl.int64) * stride_z
    h_tile_ptr = h_ptr + first_row.to(tl.int64) * stride_h
    sums_ptr = column_sums_ptr + tile_m.to(tl.int64) * stride_z
    num_rows = end - first_row
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = halves(dh, BLOCK_M, BLOCK_N)
    dots_left = store_act_grad_halves(
        left, scale, z_tile_ptr, dz_tile_ptr, h_tile_ptr, sums_ptr, first_column, num_rows, N, stride_z, stride_h,
        ACTIVATION, HAS_SCALE, STORE_H, SUM_COLUMNS, DOT_ROWS, FAST_ERF, BLOCK_M, HALF,
    )  # fmt: skip
    dots_right = store_act_grad_halves(
        right, scale, z_tile_ptr, dz_tile_ptr, h_tile_ptr, sums_ptr, first_column + HALF, num_rows, N, stride_z, stride_h,
        ACTIVATION, HAS_SCALE, STORE_H, SUM_COLUMNS, DOT_ROWS, FAST_ERF, BLOCK_M, HALF,
    )  # fmt: skip
    if DOT_ROWS:
        tl.store(row_dots_ptr + rows.to(tl.int64) * num_n + tile_n, dots_left + dots_right, mask=rows < end)


@triton.jit
def store_act_grad_halves(
    dh, scale, z_ptr, dz_ptr, h_ptr, sums_ptr, first_column, num_rows, N, stride_z, stride_h,
    ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, STORE_H: tl.constexpr, SUM_COLUMNS: tl.constexpr, DOT_ROWS: tl.constexpr,
    FAST_ERF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`store_act_grad` for the left and then the right half of the columns."""
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = halves(dh, BLOCK_M, BLOCK_N)
    dots = store_act_grad(
        left, scale, z_ptr, dz_ptr, h_ptr, sums_ptr, first_column, num_rows, N, stride_z, stride_h,
        ACTIVATION, HAS_SCALE, STORE_H, SUM_COLUMNS, DOT_ROWS, FAST_ERF, BLOCK_M, HALF,
    )  # fmt: skip
    return dots + store_act_grad(
        right, scale, z_ptr, dz_ptr, h_ptr, sums_ptr, first_column + HALF, num_rows, N, stride_z, stride_h,
        ACTIVATION, HAS_SCALE, STORE_H, SUM_COLUMNS, DOT_ROWS, FAST_ERF, BLOCK_M, HALF,
    )  # fmt: skip


@triton.jit
def store_act_grad(
    dh, scale, z_ptr, dz_ptr, h_ptr, sums_ptr, first_column, num_rows, N, stride_z, stride_h,
    ACTIVATION: tl.constexpr, HAS_SCALE: tl.constexpr, STORE_H: tl.constexpr, SUM_COLUMNS: tl.constexpr, DOT_ROWS: tl.constexpr,
    FAST_ERF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dz, h and column sums of some columns of a tile; return their share of the row dots (zeros if not asked for)."""
    columns = first_column + tl.arange(0, BLOCK_N)
    inside_m = tl.arange(0, BLOCK_M) < num_rows
    inside_n = columns < N
    inside = inside_m[:, None] & inside_n[None, :]
    z_offsets = tile_offsets(stride_z, columns, BLOCK_M)
    # Rows beyond the end repeat the group's last row; as zeros they add nothing to the sums over rows.
    dh = tl.where(inside_m[:, None], dh, 0.0)
    z = tl.load(z_ptr + z_offsets, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        value = tl.load(z_ptr + N + z_offsets, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        silu = z * sigmoid
        h = silu * value
        factor = value * (sigmoid + silu * (1.0 - sigmoid))
    else:
        cdf, pdf = normal_cdf_pdf(z, FAST_ERF)
        h = z * cdf
        factor = cdf + z * pdf
    if DOT_ROWS:
        dots = tl.sum(dh * h, 1)
    else:
        dots = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SCALE:
        dh *= scale[:, None]
        h *= scale[:, None]
    if STORE_H:
        tl.store(h_ptr + tile_offsets(stride_h, columns, BLOCK_M), h.to(h_ptr.dtype.element_ty), mask=inside)
    dz = dh * factor
    tl.store(dz_ptr + z_offsets, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if SUM_COLUMNS:
        tl.store(sums_ptr + columns, tl.sum(dz, 0), mask=inside_n)
    if ACTIVATION == "swiglu":
        dvalue = dh * silu
        tl.store(dz_ptr + N + z_offsets, dvalue.to(dz_ptr.dtype.element_ty), mask=inside)
        if SUM_COLUMNS:
            tl.store(sums_ptr + N + columns, tl.sum(dvalue, 0), mask=inside_n)
    return dots


@triton.jit
def weight_grad_kernel(
    dz_ptr, x_ptr, index_ptr, ends_ptr, dw_ptr, num_groups, width_o, width_i, stride_dz, stride_x,
    GATHER_DZ: tl.constexpr, GATHER_X: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dw[g] = sum over the group's rows of dz[row]^T x[row]: [BLOCK_M, BLOCK_N] of [O, I], BLOCK_K rows at a time, one order."""
    num_o = tl.cdiv(width_o, BLOCK_M)
    num_i = tl.cdiv(width_i, BLOCK_N)
    pid = tl.program_id(0)
    group, start, end = nth_largest_group(ends_ptr, pid // (num_o * num_i), num_groups, BLOCK_G)
    tile_o, tile_i = swizzle(pid % (num_o * num_i), num_o, num_i, GROUP_M)
    os = tile_o * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_i * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_o = os < width_o
    inside_i = columns < width_i
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        inside = rows < end
        # The last step repeats the group's last row and masks it: rows of another group or of nobody are not touched.
        rows_read = tl.minimum(rows, end - 1)
        dz_rows = source_rows(index_ptr, rows_read, GATHER_DZ, DIVISOR)
        x_rows = source_rows(index_ptr, rows_read, GATHER_X, DIVISOR)
        dz_ptrs = dz_ptr + dz_rows[None, :] * stride_dz + os[:, None]
        x_ptrs = x_ptr + x_rows[:, None] * stride_x + columns[None, :]
        if EVEN_M:
            dz = tl.load(dz_ptrs, mask=inside[None, :], other=0.0)
        else:
            dz = tl.load(dz_ptrs, mask=inside[None, :] & inside_o[:, None], other=0.0)
        # Both operands are zeroed: a row of nobody may be NaN, and 0 * NaN is NaN.
        if EVEN_N:
            x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=inside[:, None] & inside_i[None, :], other=0.0)
        acc = dot(dz, x, acc, PRECISION, UPCAST)
    dw_ptrs = dw_ptr + group.to(tl.int64) * width_o * width_i + os[:, None] * width_i + columns[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=inside_o[:, None] & inside_i[None, :])

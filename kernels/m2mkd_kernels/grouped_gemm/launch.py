"""Launches of the grouped GEMM's kernels on plain tensors, without autograd: checks, output tensors, grid.

Each `prepare_*` returns the launch and its outputs; `.run()` fills them. Outputs are uninitialised at and beyond the last end
offset. Shape letters: R rows, G groups, I and O widths of a weight [G, O, I], S rows of the tensor that is gathered from.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2mkd_kernels.configs import KernelName, TileConfig, choose_tiles
from m2mkd_kernels.runtime import (
    MAX_MATRIX,
    Launch,
    cdiv,
    check_offsets,
    check_row_index,
    check_rows,
    dot_options,
    next_power_of_2,
    require,
    require_usable,
)

Activation = Literal["none", "gelu", "swiglu"]
UNGATHERED_STAGES = 4
GELU_REGISTERS = 128  # a thread: two programs of 256 threads fill the 65536 of a multiprocessor
GEMM_NAMES: dict[Activation, KernelName] = {"none": "gemm", "gelu": "gemm_gelu", "swiglu": "gemm_swiglu"}


class RowIndex(NamedTuple):
    """Row r of an operand is row index[r] // divisor of the tensor given."""

    index_R: Tensor
    divisor: int = 1


def check_weight(weight_GOI: Tensor) -> None:
    """A stack of matrices. Raises ValueError."""
    shape = tuple(weight_GOI.shape)
    require(len(shape) == 3 and 0 not in shape, f"weight has shape {shape}; it must be [G, O, I] without a zero")


def check_operands(
    x_SI: Tensor, weight_GOI: Tensor, offsets_G: Tensor, index: RowIndex | None, reads_width: int, scale_N: Tensor | None = None
) -> None:
    """What all launches need of rows, weight, offsets, index and scale. Raises ValueError."""
    require(scale_N is None or index is not None, "a scale is looked up through the index; give both")
    require(weight_GOI.is_contiguous(), "weight must be contiguous")
    require(weight_GOI[0].numel() <= MAX_MATRIX, f"one group's matrix has {weight_GOI[0].numel()} elements; at most {MAX_MATRIX}")
    require_usable(x_SI)
    check_rows("rows", x_SI, weight_GOI.device, weight_GOI.dtype)
    require(x_SI.shape[1] == reads_width, f"rows are {x_SI.shape[1]} wide; the weight wants {reads_width}")
    check_offsets(offsets_G, weight_GOI.shape[0], weight_GOI.device)
    if index is not None:
        check_row_index(index.index_R, scale_N, weight_GOI.device)


def prepare_gemm(
    x_SI: Tensor,
    weight_GOI: Tensor,
    bias_GO: Tensor | None,
    offsets_G: Tensor,
    *,
    activation: Activation = "none",
    index: RowIndex | None = None,
    transposed: bool = False,
    want_z: bool = True,
    want_h: bool = False,
    tiles: TileConfig | None = None,
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """z = x[index] @ W[g]^T + bias[g] and h = activation(z); `transposed`: x @ W[g] instead, for the gradient of rows.

    -> (launch, z [R, O] or None, h or None). h is as wide as z (gelu) or half (swiglu).
    """
    from m2mkd_kernels.grouped_gemm.kernel import gemm_kernel

    require(activation in GEMM_NAMES, f"activation is {activation!r}; allowed is `none`, `gelu` or `swiglu`")
    check_weight(weight_GOI)
    num_groups, rows_out, width_in = weight_GOI.shape
    k, n = (rows_out, width_in) if transposed else (width_in, rows_out)
    check_operands(x_SI, weight_GOI, offsets_G, index, k)
    if bias_GO is not None:
        check_rows("bias", bias_GO, weight_GOI.device, weight_GOI.dtype)
        require(tuple(bias_GO.shape) == (num_groups, n), f"bias has shape {tuple(bias_GO.shape)}; it must be ({num_groups}, {n})")
    require(activation != "swiglu" or n % 2 == 0, f"swiglu needs an even width of gate and value together, given {n}")
    require(activation != "none" or not want_h, "without an activation there is no h to store")
    num_rows = x_SI.shape[0] if index is None else index.index_R.shape[0]
    n_half = n // 2 if activation == "swiglu" else n
    z_RO = x_SI.new_empty(num_rows, n) if want_z else None
    h_RO = x_SI.new_empty(num_rows, n_half) if want_h else None
    tiles = tiles or choose_tiles(GEMM_NAMES[activation], x_SI.dtype, num_rows, num_groups)
    num_m = cdiv(num_rows, tiles.block_m) + num_groups
    launch = Launch(
        gemm_kernel,
        (num_m * cdiv(n_half, tiles.block_n),),
        {
            "x_ptr": x_SI, "index_ptr": x_SI if index is None else index.index_R, "weight_ptr": weight_GOI,
            "bias_ptr": x_SI if bias_GO is None else bias_GO, "ends_ptr": offsets_G,
            "z_ptr": x_SI if z_RO is None else z_RO, "h_ptr": x_SI if h_RO is None else h_RO,
            "num_groups": num_groups, "num_m": num_m, "K": k, "N": n_half,
            "stride_x": x_SI.stride(0), "stride_g": weight_GOI.stride(0),
            "stride_k": width_in if transposed else 1, "stride_n": 1 if transposed else width_in,
            "stride_z": n, "stride_h": n_half, "stride_bias": 0 if bias_GO is None else bias_GO.stride(0),
        },
        {
            "ACTIVATION": activation, "GATHER": index is not None, "DIVISOR": 1 if index is None else index.divisor,
            "HAS_BIAS": bias_GO is not None, "STORE_Z": want_z, "STORE_H": want_h,
            **_tile_constants(tiles, num_groups), "EVEN_K": k % tiles.block_k == 0, "EVEN_N": n_half % tiles.block_n == 0,
            "FAST_ERF": x_SI.dtype != torch.float32, **dot_options(x_SI.dtype),
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        options={"maxnreg": GELU_REGISTERS} if activation == "gelu" and _fits_twice(x_SI, k, n, tiles) else {},
    )  # fmt: skip
    return launch, z_RO, h_RO


class ActGrad(NamedTuple):
    """What the backward through the second matrix and the activation leaves behind; None where it was not asked for."""

    dz_RU: Tensor
    h_RF: Tensor | None
    """scale * activation(z), recomputed: the rows of the second matrix's weight gradient."""
    column_sums: Tensor | None
    """fp32 [row tiles, U]: sums of dz over each row tile (for the bias gradient)."""
    row_dots: Tensor | None
    """fp32 [R, column tiles]: <dh, activation(z)> before the scale (for the routing weights' gradient)."""
    block_m: int
    """Rows of a tile in `column_sums`."""


def prepare_act_grad(
    grad_SO: Tensor,
    weight_GOF: Tensor,
    z_RU: Tensor,
    offsets_G: Tensor,
    *,
    activation: Literal["gelu", "swiglu"],
    index: RowIndex | None = None,
    scale_N: Tensor | None = None,
    want_h: bool = True,
    want_column_sums: bool = True,
    want_row_dots: bool = False,
    tiles: TileConfig | None = None,
) -> tuple[Launch, ActGrad]:
    """dz = s * (grad[index] @ W[g]) * activation'(z) and its by-products in one pass over z.

    `scale_N`: fp32, s of row r is scale[index[r]] (undivided), so it needs an index.
    """
    from m2mkd_kernels.grouped_gemm.kernel import act_grad_kernel

    check_weight(weight_GOF)
    num_groups, k, n = weight_GOF.shape
    require(activation in ("gelu", "swiglu"), f"activation is {activation!r}; allowed is `gelu` or `swiglu`")
    check_operands(grad_SO, weight_GOF, offsets_G, index, k, scale_N)
    num_rows = grad_SO.shape[0] if index is None else index.index_R.shape[0]
    width = 2 * n if activation == "swiglu" else n
    check_rows("z", z_RU, weight_GOF.device, weight_GOF.dtype)
    require(tuple(z_RU.shape) == (num_rows, width) and z_RU.is_contiguous(), f"z must be contiguous [{num_rows}, {width}]")
    tiles = tiles or choose_tiles("act_grad", grad_SO.dtype, num_rows, num_groups)
    num_m, num_n = cdiv(num_rows, tiles.block_m) + num_groups, cdiv(n, tiles.block_n)
    result = ActGrad(
        torch.empty_like(z_RU),
        grad_SO.new_empty(num_rows, n) if want_h else None,
        grad_SO.new_empty(num_m, width, dtype=torch.float32) if want_column_sums else None,
        grad_SO.new_empty(num_rows, num_n, dtype=torch.float32) if want_row_dots else None,
        tiles.block_m,
    )
    launch = Launch(
        act_grad_kernel,
        (num_m * num_n,),
        {
            "grad_ptr": grad_SO, "index_ptr": grad_SO if index is None else index.index_R, "weight_ptr": weight_GOF,
            "ends_ptr": offsets_G, "z_ptr": z_RU, "scale_ptr": grad_SO if scale_N is None else scale_N, "dz_ptr": result.dz_RU,
            "h_ptr": grad_SO if result.h_RF is None else result.h_RF,
            "column_sums_ptr": grad_SO if result.column_sums is None else result.column_sums,
            "row_dots_ptr": grad_SO if result.row_dots is None else result.row_dots,
            "num_groups": num_groups, "num_m": num_m, "K": k, "N": n,
            "stride_grad": grad_SO.stride(0), "stride_g": weight_GOF.stride(0), "stride_k": n, "stride_n": 1,
            "stride_z": width, "stride_h": n,
        },
        {
            "ACTIVATION": activation, "GATHER": index is not None, "DIVISOR": 1 if index is None else index.divisor,
            "HAS_SCALE": scale_N is not None, "STORE_H": want_h, "SUM_COLUMNS": want_column_sums, "DOT_ROWS": want_row_dots,
            **_tile_constants(tiles, num_groups), "EVEN_K": k % tiles.block_k == 0, "EVEN_N": n % tiles.block_n == 0,
            "FAST_ERF": grad_SO.dtype != torch.float32, **dot_options(grad_SO.dtype),
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    return launch, result


def prepare_weight_grad(
    grad_SO: Tensor,
    x_SI: Tensor,
    offsets_G: Tensor,
    *,
    grad_index: RowIndex | None = None,
    x_index: RowIndex | None = None,
    tiles: TileConfig | None = None,
) -> tuple[Launch, Tensor]:
    """dW[g] = sum over the group's rows of grad[row]^T x[row] -> (launch, [G, O, I]); exact zeros for a group without rows.

    At most one of the operands is gathered.
    """
    from m2mkd_kernels.grouped_gemm.kernel import weight_grad_kernel

    num_groups, o, i = offsets_G.shape[0], grad_SO.shape[1], x_SI.shape[1]
    dw_GOI = grad_SO.new_empty(num_groups, o, i)
    check_weight(dw_GOI)
    check_operands(grad_SO, dw_GOI, offsets_G, grad_index, o)
    check_operands(x_SI, dw_GOI, offsets_G, x_index, i)
    index = grad_index or x_index
    require(grad_index is None or x_index is None, "one of the two operands may be gathered, not both")
    num_rows = (grad_SO.shape[0], x_SI.shape[0]) if index is None else (index.index_R.shape[0],) * 2
    require(grad_index is not None or grad_SO.shape[0] == num_rows[1], f"gradient has {grad_SO.shape[0]} rows; it must have {num_rows[1]}")
    require(x_index is not None or x_SI.shape[0] == num_rows[0], f"x has {x_SI.shape[0]} rows; it must have {num_rows[0]}")
    tiles = tiles or choose_tiles("weight_grad", grad_SO.dtype, num_rows[0], num_groups)
    launch = Launch(
        weight_grad_kernel,
        (num_groups * cdiv(o, tiles.block_m) * cdiv(i, tiles.block_n),),
        {
            "dz_ptr": grad_SO, "x_ptr": x_SI, "index_ptr": grad_SO if index is None else index.index_R, "ends_ptr": offsets_G,
            "dw_ptr": dw_GOI, "num_groups": num_groups, "width_o": o, "width_i": i,
            "stride_dz": grad_SO.stride(0), "stride_x": x_SI.stride(0),
        },
        {
            "GATHER_DZ": grad_index is not None, "GATHER_X": x_index is not None, "DIVISOR": 1 if index is None else index.divisor,
            **_tile_constants(tiles, num_groups), "EVEN_M": o % tiles.block_m == 0, "EVEN_N": i % tiles.block_n == 0,
            **dot_options(grad_SO.dtype),
        },
        num_warps=tiles.num_warps,
        # A gathered operand loads its index a step before its rows, so n stages hold (n + 1) / 2 buffers of rows; without an index
        # they hold n, and five of the largest tile are 240 KiB where an H100 has 227.
        num_stages=tiles.num_stages if index is not None else min(tiles.num_stages, UNGATHERED_STAGES),
    )  # fmt: skip
    return launch, dw_GOI


def _fits_twice(x_SI: Tensor, k: int, n: int, tiles: TileConfig) -> bool:
    """Whether the GELU GEMM is known to fit GELU_REGISTERS without spilling, so that two programs share a multiprocessor.

    It was built so for Hopper, with full tiles of 128 x 128 and 8 warps. Elsewhere, and with masks in the loop, it would spill. Meta
    tensors are prepared as for Hopper.
    """
    hopper = x_SI.is_meta or (x_SI.is_cuda and torch.cuda.get_device_capability(x_SI.device) == (9, 0))
    full = k % tiles.block_k == 0 and n % tiles.block_n == 0
    return hopper and full and x_SI.dtype != torch.float32 and tiles[:3] == (128, 128, 64) and tiles.num_warps == 8


def _tile_constants(tiles: TileConfig, num_groups: int) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m,
        "BLOCK_G": max(16, next_power_of_2(num_groups)),
    }  # fmt: skip

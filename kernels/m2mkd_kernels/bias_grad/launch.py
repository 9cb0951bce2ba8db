"""Bias gradient on plain tensors, without autograd. Shape letters: R rows, G groups, O width, S rows that are gathered from."""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_kernels.grouped_gemm.launch import RowIndex
from m2mkd_kernels.runtime import Launch, cdiv, check_offsets, check_row_index, check_rows, next_power_of_2, require, require_usable

BLOCK_M, BLOCK_N, BLOCK_TILES = 64, 128, 32


def bias_grad(grad_SO: Tensor, offsets_G: Tensor, index: RowIndex | None = None, scale_N: Tensor | None = None) -> Tensor:
    """out[g] = sum over the group's rows of scale[index[row]] * grad[index[row] // divisor]: [G, O] in the dtype of grad.

    Exact zeros for a group without rows. `scale_N` (fp32) needs an index.
    """
    launch, sums = prepare_row_sums(grad_SO, offsets_G, index, scale_N)
    launch.run()
    return sum_tiles(sums, offsets_G, BLOCK_M, grad_SO.dtype)


def prepare_row_sums(
    grad_SO: Tensor, offsets_G: Tensor, index: RowIndex | None = None, scale_N: Tensor | None = None
) -> tuple[Launch, Tensor]:
    """The launch of the first step and its output: fp32 sums over each tile of BLOCK_M rows, [tiles, O]."""
    from m2mkd_kernels.bias_grad.kernel import sum_rows_kernel

    num_groups, width = offsets_G.shape[0], grad_SO.shape[1]
    check_rows("gradient", grad_SO, offsets_G.device, grad_SO.dtype)
    check_offsets(offsets_G, num_groups, grad_SO.device)
    require_usable(grad_SO)
    require(scale_N is None or index is not None, "a scale is looked up through the index; give both")
    if index is not None:
        check_row_index(index.index_R, scale_N, grad_SO.device)
    num_rows = grad_SO.shape[0] if index is None else index.index_R.shape[0]
    num_tiles = cdiv(num_rows, BLOCK_M) + num_groups
    sums = grad_SO.new_empty(num_tiles, width, dtype=torch.float32)
    launch = Launch(
        sum_rows_kernel,
        (num_tiles, cdiv(width, BLOCK_N)),
        {
            "grad_ptr": grad_SO, "index_ptr": grad_SO if index is None else index.index_R, "sums_ptr": sums, "ends_ptr": offsets_G,
            "scale_ptr": grad_SO if scale_N is None else scale_N,
            "num_groups": num_groups, "width": width, "stride_grad": grad_SO.stride(0),
        },
        {
            "GATHER": index is not None, "DIVISOR": 1 if index is None else index.divisor, "HAS_SCALE": scale_N is not None,
            "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_G": _block_g(num_groups),
        },
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return launch, sums


def sum_tiles(sums: Tensor, offsets_G: Tensor, block_m: int, dtype: torch.dtype) -> Tensor:
    """[G, O]: for each group the sum of its row tiles' sums (fp32 [tiles, O]), which were taken over `block_m` rows each."""
    launch, out_GO = prepare_sum_tiles(sums, offsets_G, block_m, dtype)
    launch.run()
    return out_GO


def prepare_sum_tiles(sums: Tensor, offsets_G: Tensor, block_m: int, dtype: torch.dtype) -> tuple[Launch, Tensor]:
    """The launch of `sum_tiles` and its output."""
    from m2mkd_kernels.bias_grad.kernel import sum_tiles_kernel

    num_groups, width = offsets_G.shape[0], sums.shape[1]
    out_GO = sums.new_empty(num_groups, width, dtype=dtype)
    launch = Launch(
        sum_tiles_kernel,
        (num_groups, cdiv(width, BLOCK_N)),
        {"sums_ptr": sums, "ends_ptr": offsets_G, "out_ptr": out_GO, "num_groups": num_groups, "width": width},
        {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "BLOCK_G": _block_g(num_groups), "BLOCK_TILES": BLOCK_TILES},
        num_warps=4,
        num_stages=3,
    )
    return launch, out_GO


def _block_g(num_groups: int) -> int:
    return max(16, next_power_of_2(num_groups))

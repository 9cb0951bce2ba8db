"""Tile sizes by kernel, kind of dtype and size: a table in code, not an autotuner.

An autotuner picks by the clock, so two runs of one program may sum in different orders; with a table the same inputs give the
same bits on every run, as long as machine, versions of torch and triton, shapes and alignment of the tensors are the same.
`python -m m2mkd_kernels.tune` measures candidates on a GPU and prints lines for this table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

KernelName = Literal["gemm", "gemm_gelu", "gemm_swiglu", "act_grad", "weight_grad"]
Size = Literal["small", "large"]
SMALL_ROWS_PER_GROUP = 64


class TileConfig(NamedTuple):
    """A tile of the output is block_m x block_n, summed block_k at a time; group_m row tiles share a weight panel in L2.

    `num_stages` is triton's depth of the pipeline of loads, not the number of buffers in shared memory: on Hopper that is `num_stages`,
    or (num_stages + 1) / 2 of an operand that is gathered in the loop over rows (its index is loaded a step earlier); before Hopper one
    less. The weight gradient takes at most 4 where nothing is gathered.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


# half: bf16 and fp16 on tensor cores (Hopper's wgmma wants 64 rows a warp group). The plain GEMM and the weight gradient store little
# and take the largest tile, one program a multiprocessor; the others compute and move much after the products, so they leave room
# for two or three programs, of which one can multiply while another stores. float: fp32 with IEEE products on plain cores.
# On sm_90, for widths that are multiples of the tiles, none of these spills registers in bf16 and each fits the 227 KiB of shared memory
# (tests/kernels/test_kernels_build.py). In fp32 one has 8 bytes of local memory: act_grad gelu in triton 3.8, rows grad in 3.6.
TABLE: dict[tuple[KernelName, Literal["half", "float"], Size], TileConfig] = {
    ("gemm", "half", "large"): TileConfig(128, 256, 64, 8, 8, 4),
    ("gemm", "half", "small"): TileConfig(64, 128, 64, 8, 4, 4),
    ("gemm_gelu", "half", "large"): TileConfig(128, 128, 64, 8, 8, 3),
    ("gemm_gelu", "half", "small"): TileConfig(64, 128, 64, 8, 4, 4),
    ("gemm_swiglu", "half", "large"): TileConfig(128, 64, 64, 8, 8, 3),
    ("gemm_swiglu", "half", "small"): TileConfig(64, 64, 64, 8, 4, 4),
    ("act_grad", "half", "large"): TileConfig(64, 128, 64, 8, 4, 3),
    ("act_grad", "half", "small"): TileConfig(64, 128, 64, 8, 4, 3),
    ("weight_grad", "half", "large"): TileConfig(128, 256, 64, 8, 8, 5),
    ("weight_grad", "half", "small"): TileConfig(128, 128, 64, 8, 8, 5),
    ("gemm", "float", "large"): TileConfig(64, 64, 32, 8, 4, 3),
    ("gemm", "float", "small"): TileConfig(32, 64, 32, 8, 4, 3),
    ("gemm_gelu", "float", "large"): TileConfig(64, 64, 32, 8, 4, 3),
    ("gemm_gelu", "float", "small"): TileConfig(32, 64, 32, 8, 4, 3),
    ("gemm_swiglu", "float", "large"): TileConfig(64, 32, 32, 8, 4, 3),
    ("gemm_swiglu", "float", "small"): TileConfig(32, 32, 32, 8, 4, 3),
    ("act_grad", "float", "large"): TileConfig(64, 64, 32, 8, 4, 3),
    ("act_grad", "float", "small"): TileConfig(32, 64, 32, 8, 4, 3),
    ("weight_grad", "float", "large"): TileConfig(64, 64, 32, 8, 4, 3),
    ("weight_grad", "float", "small"): TileConfig(64, 64, 32, 8, 4, 3),
}


def choose_tiles(kernel: KernelName, dtype: torch.dtype, num_rows: int, num_groups: int) -> TileConfig:
    """The table's entry for R rows in G groups (an average: the real split stays on the device)."""
    size: Size = "small" if num_rows <= SMALL_ROWS_PER_GROUP * num_groups else "large"
    return TABLE[kernel, "float" if dtype == torch.float32 else "half", size]

"""Backend `reference`: a Python loop over experts in any dtype (fp64 too). Slow, waits for the GPU, defines correctness."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "reference"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int) -> str:
    """Runs everywhere."""
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, up_EFD: Tensor, up_bias_EF: Tensor, down_EDF: Tensor, down_bias_ED: Tensor) -> Tensor:
    """Contract in `moe.backends`."""
    from m2mkd_kernels.grouped_gemm.naive import grouped_gemm_naive

    hidden_RF = grouped_gemm_naive(rows_RD, up_EFD, up_bias_EF, offsets_E, activation="gelu")
    return grouped_gemm_naive(hidden_RF, down_EDF, down_bias_ED, offsets_E, activation="none")

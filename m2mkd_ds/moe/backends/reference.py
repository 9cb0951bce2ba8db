"""Backend `reference`: a Python loop over experts in any dtype (fp64 too). Slow, waits for the GPU, defines correctness."""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights

NAME = "reference"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Runs everywhere."""
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`."""
    from m2mkd_kernels.grouped_gemm.naive import grouped_gemm_naive

    hidden_RF = grouped_gemm_naive(rows_RD, weights.up_EGD, weights.up_bias_EG, offsets_E, activation=weights.activation)
    return grouped_gemm_naive(hidden_RF, weights.down_EDF, weights.down_bias_ED, offsets_E, activation="none")

"""DeepSpeed's Triton grouped matmul (`deepspeed.ops.triton_ops`, made for its AutoEP) as an expert backend of `moe.backends.contract`.

Matrices only: bias and activation are torch's. Stricter than the contract: every row must belong to an expert.
Shape letters: R rows, E experts, D width, F hidden width, G = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights, activate

NAME = "deepspeed_triton"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Why this backend cannot run, or an empty string."""
    if device.type != "cuda":
        return f"a Triton kernel needs a CUDA device, not {device.type}"
    if dtype not in _DTYPES:
        return f"DeepSpeed's group_gemm_triton has no {dtype}"
    from deepspeed.ops.triton_ops import is_triton_available

    return "" if is_triton_available() else "DeepSpeed finds no Triton that it can use"


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`, with offsets_E[-1] = R."""
    from deepspeed.ops.triton_ops import group_gemm_triton

    row_ids_R = torch.arange(rows_RD.shape[0], device=rows_RD.device, dtype=offsets_E.dtype)
    expert_ids_R = torch.searchsorted(offsets_E, row_ids_R, right=True)
    up_RG = group_gemm_triton(rows_RD, weights.up_EGD, offsets_E, trans_b=True) + weights.up_bias_EG[expert_ids_R]
    hidden_RF = activate(up_RG, weights.activation)
    return group_gemm_triton(hidden_RF, weights.down_EDF, offsets_E, trans_b=True) + weights.down_bias_ED[expert_ids_R]

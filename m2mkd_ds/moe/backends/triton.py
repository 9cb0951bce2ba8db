"""Backend `triton`: our fused kernels of `m2mkd_kernels.expert_ffn`, from rows to rows or, better, the whole layer at once.

`run_layer` is the fast path: the tokens of each row are gathered inside the GEMMs, so no permuted copy is written in either
direction, and the weighted sum at the end is one pass. What it saves for the backward is told in kernels/README.md.
Shape letters: T tokens, K choices a token, R rows, E experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights
from m2mkd_ds.moe.dispatch import DispatchPlan

NAME = "triton"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Why this backend cannot run so, or an empty string. Any widths and both activations will do.

    Widths that are not multiples of 16 elements are right but slow (kernels/README.md).
    """
    from m2mkd_kernels.runtime import why_not as kernels_why_not

    return kernels_why_not(device, dtype)


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`."""
    from m2mkd_kernels.expert_ffn.op import FfnWeights, expert_ffn

    return expert_ffn(rows_RD, offsets_E, FfnWeights(*weights[:4]), weights.activation)


def run_layer(x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
    """combine(run(permute(x)), weights_TK) without the rows in between: [T, D], fp32 [T, K] -> [T, D] in the dtype of the weights."""
    from m2mkd_kernels.expert_ffn.op import FfnWeights, expert_layer
    from m2mkd_kernels.gather import Gather

    # A plan keeps the strides of the ids that it was made of; the kernels count choices through.
    kept_TK = None if plan.kept_TK is None else plan.kept_TK.contiguous()
    gather = Gather(plan.order_R.contiguous(), plan.rows_TK.contiguous(), kept_TK)
    return expert_layer(x_TD, weights_TK, gather, plan.offsets_E, FfnWeights(*weights[:4]), weights.activation)

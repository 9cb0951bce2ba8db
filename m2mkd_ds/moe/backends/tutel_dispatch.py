"""Backend `tutel_dispatch`: Tutel's dispatch kernels put rows into a slot of equal length for every expert, [E, C, D], and take them out
again; between them batched matmuls, as in `padded`. The router stays ours, and so does the exchange between ranks. For those who know
Tutel from elsewhere and want its kernels in this trainer; C is the largest count, so nothing is dropped.

Tutel is optional and not on PyPI. On a CPU its kernels are scalar loops over fp32; on a GPU they are compiled when first used. Each slot
gets one row, so the result does not depend on any order. Shape letters: R rows, E experts, C slots an expert, D width, F hidden width.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights, activate

NAME = "tutel_dispatch"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Needs Tutel; on a CPU fp32."""
    if importlib.util.find_spec("tutel") is None:
        return "Tutel is not installed; it is not on PyPI: install it from github.com/microsoft/tutel against this torch"
    if device.type == "cpu" and dtype is not torch.float32:
        return f"Tutel's CPU kernels have no {dtype}, only torch.float32"
    if dtype is torch.float16 and dim % 2:
        return f"Tutel's fp16 kernels take even widths only, given embed_dim {dim}"
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`. Host sync: the largest count is read, because it is a shape."""
    from tutel.impls.fast_dispatch import GatingDecoder, GatingEncoder

    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    num_experts, capacity = counts_E.shape[0], int(counts_E.max())
    if not capacity:  # the kernels take no empty buffer; every weight has a gradient of zeros all the same
        capacity = 1
    kernels = _kernels(rows_RD, offsets_E, offsets_E - counts_E, capacity)
    x_ECD = GatingEncoder.apply(kernels, rows_RD.contiguous()).view(num_experts, capacity, weights.dim).to(rows_RD.dtype)
    z_ECG = torch.baddbmm(weights.up_bias_EG[:, None], x_ECD, weights.up_EGD.transpose(1, 2))
    y_ECD = torch.baddbmm(weights.down_bias_ED[:, None], activate(z_ECG, weights.activation), weights.down_EDF.transpose(1, 2))
    return GatingDecoder.apply(kernels, y_ECD.flatten(0, 1)).to(rows_RD.dtype)


def _kernels(rows_RD: Tensor, offsets_E: Tensor, starts_E: Tensor, capacity: int) -> Any:
    """Tutel's dispatcher, told one choice a row: its expert (-1 for rows of nobody, which it passes over) and its place there."""
    from tutel.impls.fast_dispatch import TutelMoeFastDispatcher

    num_rows, num_experts = rows_RD.shape[0], offsets_E.shape[0]
    rows_R = torch.arange(num_rows, device=rows_RD.device, dtype=torch.int32)
    expert_R = torch.searchsorted(offsets_E, rows_R, right=True).to(torch.int32)
    is_owned_R = expert_R < num_experts
    place_R = rows_R - starts_E[expert_R.clamp(max=num_experts - 1).long()]
    dispatcher = TutelMoeFastDispatcher(num_experts, capacity, rows_RD.shape[1], rows_RD.dtype)
    dispatcher.update([expert_R.where(is_owned_R, -1)], [place_R.to(torch.int32)], [], capacity)
    return dispatcher

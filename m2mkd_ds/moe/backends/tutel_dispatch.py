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

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights
from m2mkd_ds.moe.backends.padded import run_slots

NAME = "tutel_dispatch"
HOW_TO_GET = "Tutel is not on PyPI: install it from github.com/microsoft/tutel against this torch"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Needs Tutel, and fp32: of all other types but fp16 Tutel makes fp32 on the way, and it keeps one set of kernels a process, those of
    the type that came first."""
    if importlib.util.find_spec("tutel") is None:
        return f"Tutel is not installed; {HOW_TO_GET}"
    if dtype is not torch.float32:
        return f"its kernels stand here for torch.float32 only, not {dtype}"
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`. Host sync: the largest count is read, because it is a shape."""
    from tutel.impls.fast_dispatch import GatingDecoder, GatingEncoder

    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    num_experts, capacity = counts_E.shape[0], int(counts_E.max())
    kernels = _kernels(rows_RD, offsets_E, offsets_E - counts_E, capacity)
    x_ECD = GatingEncoder.apply(kernels, rows_RD.contiguous()).view(num_experts, capacity, weights.dim)
    return GatingDecoder.apply(kernels, run_slots(x_ECD, weights).flatten(0, 1))


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

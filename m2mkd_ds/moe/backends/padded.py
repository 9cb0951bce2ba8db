"""Backend `padded`: every expert's rows in a slot of equal length, [E, C, D], then batched matmuls: the shape that Tutel and
DeepSpeed compute in. C is the largest count, so nothing is dropped, and time and memory grow with the imbalance of the routing:
E * C rows are computed for R. For comparison, and for many small experts of nearly equal load.

Padding is zero on the way in and its gradient is zero on the way back, so it adds exact zeros to every weight gradient.
Shape letters: R rows, E experts, C slots an expert, D width, F hidden width, G = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights, activate

NAME = "padded"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Runs everywhere."""
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`. Host sync: the largest count is read, because it is a shape."""
    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    num_experts, capacity = counts_E.shape[0], int(counts_E.max())
    starts_E = offsets_E - counts_E
    device = rows_RD.device
    # Slot -> row and row -> slot; where there is none, index 0 and a mask.
    slots_C = torch.arange(capacity, device=device)
    used_EC = slots_C < counts_E[:, None]
    row_of_slot_N = torch.where(used_EC, starts_E[:, None] + slots_C, 0).reshape(-1)
    rows_R = torch.arange(rows_RD.shape[0], device=device)
    owned_R = rows_R < offsets_E[-1]
    expert_R = torch.searchsorted(offsets_E, rows_R, right=True).clamp_(max=num_experts - 1)
    slot_of_row_R = torch.where(owned_R, expert_R * capacity + rows_R - starts_E[expert_R], 0)
    to_slots, to_rows = (row_of_slot_N, used_EC.reshape(-1)), (slot_of_row_R, owned_R)

    x_ECD = _MaskedGather.apply(rows_RD, *to_slots, *to_rows).view(num_experts, capacity, weights.dim)
    return _MaskedGather.apply(run_slots(x_ECD, weights).flatten(0, 1), *to_rows, *to_slots)


def run_slots(x_ECD: Tensor, weights: ExpertWeights) -> Tensor:
    """Every expert on its C slots, empty ones too: [E, C, D] -> [E, C, D], by batched matmuls."""
    z_ECG = torch.baddbmm(weights.up_bias_EG[:, None], x_ECD, weights.up_EGD.transpose(1, 2))
    return torch.baddbmm(weights.down_bias_ED[:, None], activate(z_ECG, weights.activation), weights.down_EDF.transpose(1, 2))


class _MaskedGather(torch.autograd.Function):
    """out[i] = source[index[i]], zero where the mask is false; the gradient is the same gather the other way (no atomics).

    index and back_index are inverse to each other where the masks are true.
    """

    @staticmethod
    def forward(ctx: Any, source_ND: Tensor, index_M: Tensor, mask_M: Tensor, back_index_N: Tensor, back_mask_N: Tensor) -> Tensor:
        ctx.save_for_backward(back_index_N, back_mask_N)
        return _gather(source_ND, index_M, mask_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _gather(grads[0], *ctx.saved_tensors), None, None, None, None


def _gather(source_ND: Tensor, index_M: Tensor, mask_M: Tensor) -> Tensor:
    if not source_ND.shape[0]:
        return source_ND.new_zeros(index_M.shape[0], source_ND.shape[1])  # all masked, and there is no row 0 to read
    return source_ND.index_select(0, index_M).masked_fill_(~mask_M[:, None], 0)

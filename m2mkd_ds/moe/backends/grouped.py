"""Backend `grouped`: torch's grouped matmul plus bias and activation, no host sync on GPUs where torch has the fast path.

Facts about torch's operator (seen in 2.13 and 2.15) that shape this file: every stride must be a multiple of 16 bytes, offsets
must be int32, there is no bias, autocast is ignored, fp64 is refused, and rows beyond the last offset are uninitialised memory,
in the output and in the gradient of the rows alike: elementwise steps may carry them along, no sum over rows may take them in.
Shape letters: R rows, E experts, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights, activate

NAME = "grouped"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm_op() -> Callable[..., Tensor] | None:
    """torch's operator under its public or, in older releases, its private name; None if this torch has neither."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Why this backend cannot run, or an empty string."""
    if grouped_mm_op() is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype not in _DTYPES:
        return f"grouped_mm has no {dtype}"
    multiple = 16 // dtype.itemsize
    if dim % multiple or hidden % multiple:
        return f"for {dtype} grouped_mm needs widths that are multiples of {multiple}, given embed_dim {dim} and expert width {hidden}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"grouped_mm needs compute capability 8.0, {torch.cuda.get_device_name(device)} is older"
    if device.type not in ("cpu", "cuda"):
        return f"grouped_mm is not tested on device type {device.type!r}"
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`."""
    up_RG = _grouped_linear(rows_RD, offsets_E, weights.up_EGD, weights.up_bias_EG)
    return _grouped_linear(activate(up_RG, weights.activation), offsets_E, weights.down_EDF, weights.down_bias_ED)


def _grouped_linear(rows_RI: Tensor, offsets_E: Tensor, weight_EOI: Tensor, bias_EO: Tensor) -> Tensor:
    """Rows of expert e times weight[e]^T plus bias[e]."""
    op = grouped_mm_op()
    assert op is not None  # why_not has been asked
    return _AddGroupBias.apply(op(rows_RI.contiguous(), weight_EOI.transpose(-2, -1), offs=offsets_E), bias_EO, offsets_E)


class _AddGroupBias(torch.autograd.Function):
    """rows + bias of the row's expert. The gradient of the bias is a grouped matmul with ones: deterministic, no atomics."""

    @staticmethod
    def forward(ctx: Any, rows_RO: Tensor, bias_EO: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(offsets_E)
        row_ids_R = torch.arange(rows_RO.shape[0], device=rows_RO.device, dtype=torch.int32)
        # Rows beyond the last offset belong to nobody and would index past the last expert.
        expert_ids_R = torch.searchsorted(offsets_E, row_ids_R, right=True).clamp_(max=bias_EO.shape[0] - 1)
        return rows_RO + bias_EO.index_select(0, expert_ids_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (offsets_E,) = ctx.saved_tensors
        # grouped_mm's own backward takes no expanded strides, and contiguous() leaves those of an empty tensor alone.
        grad_RO = grads[0].contiguous() if grads[0].numel() else torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        op = grouped_mm_op()
        assert op is not None
        # One row of ones would do; the operator wants strides of 16 bytes, so 16 // itemsize equal rows, of which the first is kept.
        ones_R = grad_RO.new_ones(grad_RO.shape[0], 16 // grad_RO.element_size())
        return grad_RO, op(ones_R.t(), grad_RO, offs=offsets_E)[:, 0], None

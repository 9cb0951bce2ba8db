"""The tensors of a dispatch plan that kernels need to read tokens as rows and rows as tokens.

Shape letters: T tokens, K choices a token, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m2mkd_kernels.runtime import require


class Gather(NamedTuple):
    """Row r is choice order[r] % K of token order[r] // K; choice (t, k) sits in row rows[t, k] if it is kept."""

    order_R: Tensor
    """int64: row -> token*K + choice; holds a valid number also for rows that belong to nobody."""
    rows_TK: Tensor
    """int64: (token, choice) -> row; any row number for a choice that is not kept."""
    kept_TK: Tensor | None = None
    """bool: whether the choice has a row; None when every one has."""

    @property
    def num_rows(self) -> int:
        return self.order_R.shape[0]

    @property
    def top_k(self) -> int:
        return self.rows_TK.shape[1]


def check_gather(gather: Gather, num_tokens: int, device: torch.device) -> None:
    """Shapes, dtypes, strides and devices; no values (that would wait for the GPU). Raises ValueError."""
    shape = tuple(gather.rows_TK.shape)
    require(len(shape) == 2 and shape[0] == num_tokens and shape[1] > 0, f"rows_TK has shape {shape}; it must be ({num_tokens}, K)")
    require(gather.order_R.dim() == 1, f"order_R has {gather.order_R.dim()} dimensions; it must have one")
    for name, tensor, dtype in (
        ("order_R", gather.order_R, torch.int64),
        ("rows_TK", gather.rows_TK, torch.int64),
        ("kept_TK", gather.kept_TK, torch.bool),
    ):
        if tensor is None:
            continue
        require(tensor.dtype == dtype, f"{name} is {tensor.dtype}; it must be {dtype}")
        require(tensor.is_contiguous(), f"{name} must be contiguous")
        require(tensor.device == device, f"{name} is on {tensor.device}; it must be on {device} like the other tensors")
    kept = gather.kept_TK
    require(kept is None or tuple(kept.shape) == shape, f"kept_TK must have the shape of rows_TK, {shape}")


def check_weights(weights_TK: Tensor, gather: Gather) -> None:
    """fp32 combine weights of the plan's shape."""
    shape = tuple(gather.rows_TK.shape)
    require(tuple(weights_TK.shape) == shape, f"weights_TK has shape {tuple(weights_TK.shape)}; it must be {shape} like rows_TK")
    require(weights_TK.dtype == torch.float32, f"weights_TK is {weights_TK.dtype}; combine weights are float32")
    require(weights_TK.device == gather.rows_TK.device, f"weights_TK is on {weights_TK.device}; it must be on {gather.rows_TK.device}")

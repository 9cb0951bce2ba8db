"""The grouped GEMM that defines correctness: a Python loop over groups, any dtype, plain autograd.

Shape letters: R rows, G groups, I input width, O output width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_gemm_naive(
    rows_RI: Tensor,
    weight_GOI: Tensor,
    bias_GO: Tensor | None,
    offsets_G: Tensor,
    *,
    activation: Literal["none", "gelu", "swiglu"] = "none",
) -> Tensor:
    """out[r] = activation(weight[g] @ rows[r] + bias[g]) for the group g that owns row r -> [R, O] (swiglu: [R, O/2]).

    Group g owns rows offsets[g-1]..offsets[g]-1 (it may own none; its gradients are then zero). Rows beyond the last offset are
    not read; the output there is zero. `gelu` is the exact erf form, `swiglu` is silu(first half) * second half.
    Reads the offsets on the host. Raises ValueError for offsets that fall or go beyond R, and for an unknown activation.
    """
    if activation not in ("none", "gelu", "swiglu"):
        raise ValueError(f"activation is {activation!r}; allowed is `none`, `gelu` or `swiglu`")
    ends = offsets_G.tolist()
    starts = [0, *ends[:-1]]
    if any(end < start for start, end in zip(starts, ends, strict=True)) or ends[-1] > rows_RI.shape[0]:
        raise ValueError(f"offsets {ends} must rise and not go beyond the number of rows, {rows_RI.shape[0]}")
    biases = [None] * len(ends) if bias_GO is None else bias_GO.unbind(0)
    # unbind, not indexing in the loop: its backward is one stack instead of G zero-filled copies of the whole weight.
    groups = zip(starts, ends, weight_GOI.unbind(0), biases, strict=True)
    out_RO = torch.cat([_linear(rows_RI[start:end], weight, bias) for start, end, weight, bias in groups])
    if activation == "gelu":
        out_RO = F.gelu(out_RO)
    elif activation == "swiglu":
        gate, value = out_RO.chunk(2, dim=-1)
        out_RO = F.silu(gate) * value
    return F.pad(out_RO, (0, 0, 0, rows_RI.shape[0] - ends[-1]))


def _linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b. Not F.linear: that starts the sum with the bias, and versions that add it last would differ in the last bit."""
    out_RO = x_RI @ weight_OI.t()
    return out_RO if bias_O is None else out_RO + bias_O

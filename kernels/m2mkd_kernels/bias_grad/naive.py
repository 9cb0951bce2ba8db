"""The sums over a group's rows that define correctness: a Python loop, any dtype. Shape letters: R rows, G groups, O width."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_grad_naive(grad_RO: Tensor, offsets_G: Tensor, scale_R: Tensor | None = None) -> Tensor:
    """[G, O]: for each group the sum of scale[r] * grad[r] over its rows; exact zeros for a group without rows.

    Rows beyond the last offset are not read. Reads the offsets on the host.
    """
    ends = offsets_G.tolist()
    sums = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        rows = grad_RO[start:end]
        sums.append((rows if scale_R is None else rows * scale_R[start:end, None]).sum(0))
    return torch.stack(sums)

"""The weighted sum that defines correctness: plain indexing and autograd. Shape letters: T tokens, R rows, D width, K choices."""

from __future__ import annotations

import torch
from torch import Tensor


def combine_naive(rows_RD: Tensor, weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """y[t] = sum over kept choices k of weights[t, k] * rows[rows[t, k]]: [R, D] -> [T, D].

    A choice that is not kept adds nothing and gets no gradient, whatever its weight and the row it names hold.
    """
    chosen_TKD = rows_RD[rows_TK]
    if kept_TK is not None:
        chosen_TKD = torch.where(kept_TK[..., None], chosen_TKD, 0)
        weights_TK = torch.where(kept_TK, weights_TK, 0)
    return (chosen_TKD * weights_TK[..., None]).sum(1)

"""The permutation that defines correctness: plain indexing and autograd. Shape letters: T tokens, R rows, D width, K choices."""

from __future__ import annotations

import torch
from torch import Tensor


def permute_naive(x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """rows[r] = x[order[r] // K]: [T, D] -> [R, D]."""
    return x_TD[order_R // top_k]


def sum_rows_naive(rows_RD: Tensor, rows_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    """[T, D]: the sum of each token's kept rows; what a row that nobody kept holds does not matter."""
    chosen_TKD = rows_RD[rows_TK]
    return (chosen_TKD if kept_TK is None else torch.where(kept_TK[..., None], chosen_TKD, 0)).sum(1)

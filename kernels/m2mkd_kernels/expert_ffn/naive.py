"""The experts' layer that defines correctness, from the other naive kernels: any dtype, plain autograd.

Shape letters: T tokens, K choices a token, R rows, E experts, D width, F hidden width, U = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from m2mkd_kernels.combine.naive import combine_naive
from m2mkd_kernels.gather import Gather
from m2mkd_kernels.grouped_gemm.naive import grouped_gemm_naive
from m2mkd_kernels.permute.naive import permute_naive


def expert_ffn_naive(
    rows_RD: Tensor,
    offsets_E: Tensor,
    up_EUD: Tensor,
    up_bias_EU: Tensor,
    down_EDF: Tensor,
    down_bias_ED: Tensor,
    *,
    activation: Literal["gelu", "swiglu"] = "gelu",
) -> Tensor:
    """Each expert's down(activation(up(row))): [R, D] -> [R, D]; zeros beyond the last offset."""
    hidden_RF = grouped_gemm_naive(rows_RD, up_EUD, up_bias_EU, offsets_E, activation=activation)
    return grouped_gemm_naive(hidden_RF, down_EDF, down_bias_ED, offsets_E)


def expert_layer_naive(
    x_TD: Tensor,
    weights_TK: Tensor,
    gather: Gather,
    offsets_E: Tensor,
    up_EUD: Tensor,
    up_bias_EU: Tensor,
    down_EDF: Tensor,
    down_bias_ED: Tensor,
    *,
    activation: Literal["gelu", "swiglu"] = "gelu",
) -> Tensor:
    """Tokens to rows, experts, weighted sum of each token's rows: [T, D] -> [T, D]."""
    rows_RD = permute_naive(x_TD, gather.order_R, gather.top_k)
    out_RD = expert_ffn_naive(rows_RD, offsets_E, up_EUD, up_bias_EU, down_EDF, down_bias_ED, activation=activation)
    return combine_naive(out_RD, weights_TK, gather.rows_TK, gather.kept_TK)

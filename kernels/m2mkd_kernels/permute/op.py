"""Tokens to rows with autograd: a gather whose gradient is a gather and an fp32 sum over each token's choices.

Shape letters: T tokens, K choices a token, R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m2mkd_kernels.combine.launch import sum_choices
from m2mkd_kernels.gather import Gather, check_gather
from m2mkd_kernels.runtime import Launch, cdiv, check_rows, eager_only, first_order_only, next_power_of_2, require_usable, row_major


@eager_only
def permute(x_TD: Tensor, gather: Gather) -> Tensor:
    """rows[r] = x[order[r] // K]: [T, D] -> [R, D]. In the backward, rows that no choice names are not read.

    Raises ValueError for wrong shapes and dtypes.
    """
    return _Permute.apply(x_TD, *gather)


def gather_rows(x_TD: Tensor, gather: Gather) -> Tensor:
    """`permute` without autograd."""
    launch, out_RD = prepare_permute(x_TD, gather)
    launch.run()
    return out_RD


def prepare_permute(x_TD: Tensor, gather: Gather) -> tuple[Launch, Tensor]:
    """The launch of `gather_rows` and its output."""
    from m2mkd_kernels.permute.kernel import permute_kernel

    require_usable(x_TD)
    check_rows("x", x_TD, x_TD.device, x_TD.dtype)
    check_gather(gather, x_TD.shape[0], x_TD.device)
    num_rows, width = gather.num_rows, x_TD.shape[1]
    out_RD = x_TD.new_empty(num_rows, width)
    block_d = min(256, max(16, next_power_of_2(width)))
    launch = Launch(
        permute_kernel,
        (cdiv(num_rows, 8), cdiv(width, block_d)),
        {
            "x_ptr": x_TD, "order_ptr": gather.order_R, "out_ptr": out_RD, "num_rows": num_rows, "D": width,
            "stride_x": x_TD.stride(0),
        },
        {"DIVISOR": gather.top_k, "BLOCK_R": 8, "BLOCK_D": block_d},
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return launch, out_RD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, rows_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(order_R, rows_TK, kept_TK)
        return gather_rows(row_major(x_TD), Gather(order_R, rows_TK, kept_TK))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_choices(row_major(grad_RD), None, Gather(*ctx.saved_tensors)), None, None, None

"""Gradient of the routing weights on plain tensors. Shape letters: T tokens, K choices, R rows, E experts, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_kernels.gather import Gather
from m2mkd_kernels.runtime import Launch, cdiv, next_power_of_2


def routing_grad(row_dots: Tensor, grad_TD: Tensor, down_bias_ED: Tensor, offsets_E: Tensor, gather: Gather) -> Tensor:
    """fp32 [T, K]: <grad[t], output row of the choice>, from `row_dots` [R, parts] of the activation's backward; 0 if not kept."""
    launch, out_TK = prepare_routing_grad(row_dots, grad_TD, down_bias_ED, offsets_E, gather)
    launch.run()
    return out_TK


def prepare_routing_grad(
    row_dots: Tensor, grad_TD: Tensor, down_bias_ED: Tensor, offsets_E: Tensor, gather: Gather
) -> tuple[Launch, Tensor]:
    """The launch of `routing_grad` and its output."""
    from m2mkd_kernels.expert_ffn.kernel import routing_grad_kernel

    num_tokens, top_k = gather.rows_TK.shape
    num_experts, width = down_bias_ED.shape
    out_TK = grad_TD.new_empty(num_tokens, top_k, dtype=torch.float32)
    kept_TK = gather.rows_TK if gather.kept_TK is None else gather.kept_TK.view(torch.uint8)
    launch = Launch(
        routing_grad_kernel,
        (cdiv(num_tokens, 4),),
        {
            "row_dots_ptr": row_dots, "grad_ptr": grad_TD, "bias_ptr": down_bias_ED, "rows_ptr": gather.rows_TK, "kept_ptr": kept_TK,
            "ends_ptr": offsets_E, "out_ptr": out_TK, "num_tokens": num_tokens, "num_groups": num_experts,
            "num_parts": row_dots.shape[1], "D": width, "stride_grad": grad_TD.stride(0),
        },
        {
            "K": top_k, "HAS_KEPT": gather.kept_TK is not None, "BLOCK_T": 4, "BLOCK_P": max(16, next_power_of_2(row_dots.shape[1])),
            "BLOCK_D": min(256, max(16, next_power_of_2(width))), "BLOCK_G": max(16, next_power_of_2(num_experts)),
        },
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return launch, out_TK

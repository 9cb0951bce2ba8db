"""Combine and its backward on plain tensors, without autograd. Shape letters: T tokens, K choices, R rows, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_kernels.gather import Gather, check_gather, check_weights
from m2mkd_kernels.runtime import Launch, cdiv, check_rows, next_power_of_2, require, require_usable


def sum_choices(rows_RD: Tensor, weights_TK: Tensor | None, gather: Gather) -> Tensor:
    """y[t] = sum over kept choices of weights[t, k] * rows[rows[t, k]] (without weights the plain sum), in fp32 -> [T, D]."""
    launch, out_TD = prepare_sum_choices(rows_RD, weights_TK, gather)
    launch.run()
    return out_TD


def prepare_sum_choices(rows_RD: Tensor, weights_TK: Tensor | None, gather: Gather) -> tuple[Launch, Tensor]:
    """The launch of `sum_choices` and its output."""
    from m2mkd_kernels.combine.kernel import combine_kernel

    num_tokens, width = gather.rows_TK.shape[0], rows_RD.shape[1]
    _check(rows_RD, gather)
    out_TD = rows_RD.new_empty(num_tokens, width)
    block_d = min(256, max(16, next_power_of_2(width)))
    launch = Launch(
        combine_kernel,
        (cdiv(num_tokens, 8), cdiv(width, block_d)),
        {
            "x_ptr": rows_RD, "weights_ptr": rows_RD if weights_TK is None else weights_TK, "out_ptr": out_TD,
            **_choice_pointers(gather), "num_tokens": num_tokens, "D": width, "stride_x": rows_RD.stride(0),
        },
        {
            "K": gather.top_k, "HAS_WEIGHTS": weights_TK is not None, "HAS_KEPT": gather.kept_TK is not None,
            "BLOCK_T": 8, "BLOCK_D": block_d,
        },
        num_warps=4,
        num_stages=3,
        # Product and sum round one after the other, as in the plain code of the exported model; an fma would round once.
        options={"enable_fp_fusion": False},
    )  # fmt: skip
    return launch, out_TD


def combine_backward(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, gather: Gather, *, want_rows: bool, want_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the rows [R, D], gradient of the weights [T, K] fp32), either None if not wanted, in one pass over the rows.

    Rows that no choice names are left uninitialised in the first; a choice that is not kept has zero in the second.
    """
    launch, drows_RD, dweights_TK = prepare_combine_backward(
        grad_TD, rows_RD, weights_TK, gather, want_rows=want_rows, want_weights=want_weights
    )
    launch.run()
    return drows_RD, dweights_TK


def prepare_combine_backward(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, gather: Gather, *, want_rows: bool, want_weights: bool
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """The launch of `combine_backward` and its outputs."""
    from m2mkd_kernels.combine.kernel import combine_backward_kernel

    num_tokens, width = gather.rows_TK.shape[0], rows_RD.shape[1]
    _check(rows_RD, gather)
    check_rows("gradient", grad_TD, rows_RD.device, rows_RD.dtype)
    require(tuple(grad_TD.shape) == (num_tokens, width), f"gradient has shape {tuple(grad_TD.shape)}; it must be ({num_tokens}, {width})")
    drows_RD = rows_RD.new_empty(rows_RD.shape) if want_rows else None
    dweights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format) if want_weights else None
    block_d = min(256, max(16, next_power_of_2(width)))
    launch = Launch(
        combine_backward_kernel,
        (cdiv(num_tokens, 4),),
        {
            "grad_ptr": grad_TD, "x_ptr": rows_RD, "weights_ptr": weights_TK,
            "dx_ptr": rows_RD if drows_RD is None else drows_RD, "dweights_ptr": weights_TK if dweights_TK is None else dweights_TK,
            **_choice_pointers(gather), "num_tokens": num_tokens, "D": width,
            "stride_grad": grad_TD.stride(0), "stride_x": rows_RD.stride(0),
        },
        {
            "K": gather.top_k, "HAS_KEPT": gather.kept_TK is not None, "STORE_DX": want_rows, "STORE_DWEIGHTS": want_weights,
            "BLOCK_T": 4, "BLOCK_D": block_d,
        },
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return launch, drows_RD, dweights_TK


def _choice_pointers(gather: Gather) -> dict[str, Tensor]:
    kept_TK = gather.rows_TK if gather.kept_TK is None else gather.kept_TK.view(torch.uint8)
    return {"rows_ptr": gather.rows_TK, "kept_ptr": kept_TK}


def _check(rows_RD: Tensor, gather: Gather) -> None:
    require_usable(rows_RD)
    check_rows("rows", rows_RD, rows_RD.device, rows_RD.dtype)
    require(rows_RD.shape[0] == gather.num_rows, f"there are {rows_RD.shape[0]} rows; the plan has {gather.num_rows}")
    check_gather(gather, gather.rows_TK.shape[0], rows_RD.device)


def contiguous_weights(weights_TK: Tensor, gather: Gather) -> Tensor:
    """The weights, checked and contiguous."""
    check_weights(weights_TK, gather)
    return weights_TK.contiguous()

"""Grouped GEMM with autograd: activation(x @ W[g]^T + bias[g]) on rows sorted by group, optionally on tokens gathered on the way.

For two such maps in a row `expert_ffn` is better: it fuses the activation's gradient, which here is a pass of its own.
Shape letters: T tokens, R rows, G groups, I input width, O output width of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m2mkd_kernels.bias_grad.launch import bias_grad
from m2mkd_kernels.combine.launch import sum_choices
from m2mkd_kernels.gather import Gather, check_gather
from m2mkd_kernels.grouped_gemm.launch import Activation, RowIndex, prepare_gemm, prepare_weight_grad
from m2mkd_kernels.runtime import eager_only, first_order_only, row_major


@eager_only
def grouped_gemm(
    x_RI: Tensor,
    weight_GOI: Tensor,
    bias_GO: Tensor | None,
    offsets_G: Tensor,
    *,
    activation: Activation = "none",
    gather: Gather | None = None,
) -> Tensor:
    """[R, I] -> [R, O] (swiglu: [R, O/2]); with `gather` x is [T, I] and row r is x[order[r] // K], never written out.

    Rows at and beyond the last end offset are not read; the output there and its part of the gradient of x are unspecified.
    Raises ValueError for shapes, dtypes and strides that the kernels do not take. There are no second-order gradients.
    """
    return _GroupedGemm.apply(x_RI, weight_GOI, bias_GO, offsets_G, activation, gather, torch.is_grad_enabled())


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RI: Tensor,
        weight_GOI: Tensor,
        bias_GO: Tensor | None,
        offsets_G: Tensor,
        activation: Activation,
        gather: Gather | None,
        grad_enabled: bool,
    ) -> Tensor:
        index = None
        if gather is not None:
            check_gather(gather, x_RI.shape[0], x_RI.device)
            index = RowIndex(gather.order_R, gather.top_k)
        x_RI, weight_GOI = row_major(x_RI), weight_GOI.contiguous()
        active = activation != "none"
        want_z = not active or (grad_enabled and any(ctx.needs_input_grad))
        launch, z_RO, h_RO = prepare_gemm(
            x_RI, weight_GOI, bias_GO, offsets_G, activation=activation, index=index, want_z=want_z, want_h=active
        )
        launch.run()
        out_RO = h_RO if active else z_RO
        assert out_RO is not None
        ctx.activation = activation
        ctx.save_for_backward(x_RI, weight_GOI, offsets_G, z_RO if active else None, *(gather or ()))
        return out_RO

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, weight_GOI, offsets_G, z_RO, *plan = ctx.saved_tensors
        gather = Gather(*plan) if plan else None
        index = None if gather is None else RowIndex(gather.order_R, gather.top_k)
        grad_RO = row_major(_activation_grad(grad_RO, z_RO, ctx.activation))
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        dx_RI = dweight_GOI = dbias_GO = None
        if want_x:
            launch, dx_RI, _ = prepare_gemm(grad_RO, weight_GOI, None, offsets_G, transposed=True)
            launch.run()
            if gather is not None:
                assert dx_RI is not None
                dx_RI = sum_choices(dx_RI, None, gather)
        if want_weight:
            launch, dweight_GOI = prepare_weight_grad(grad_RO, x_RI, offsets_G, x_index=index)
            launch.run()
        if want_bias:
            dbias_GO = bias_grad(grad_RO, offsets_G)
        return dx_RI, dweight_GOI, dbias_GO, None, None, None, None


def _activation_grad(grad_RO: Tensor, z_RO: Tensor | None, activation: Activation) -> Tensor:
    """Gradient of z from that of the output. Elementwise, so what rows of nobody hold stays in their rows."""
    if z_RO is None:
        return grad_RO
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad_RO, z_RO)
    gate, value = z_RO.float().chunk(2, dim=-1)
    grad = grad_RO.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([grad * value * (sigmoid + silu * (1 - sigmoid)), grad * silu], dim=-1).to(z_RO.dtype)

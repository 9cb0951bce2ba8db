"""The experts with autograd, kernels and memory planned together: y = combine(down(activation(up(x[tokens of the rows])))).

What a routed row keeps for the backward is z, the input of the activation, and nothing else: 2U bytes in bf16. Neither the
permuted tokens, nor h = activation(z), nor the second map's output is kept:

- the two GEMMs that read tokens by row (forward: x; backward: the incoming gradient) gather while they load;
- h is recomputed in the pass over z that the activation's gradient needs anyway, and lives until the next kernel has read it;
- the routing weight's gradient is <dy, y> = <W^T dy, h> + <dy, b>, so y is not needed.

Shape letters: T tokens, K choices a token, R rows, E experts, D width, F hidden width, U = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from m2mkd_kernels.bias_grad.launch import bias_grad, sum_tiles
from m2mkd_kernels.combine.launch import contiguous_weights, sum_choices
from m2mkd_kernels.expert_ffn.launch import routing_grad
from m2mkd_kernels.gather import Gather, check_gather
from m2mkd_kernels.grouped_gemm.launch import ActGrad, RowIndex, prepare_act_grad, prepare_gemm, prepare_weight_grad
from m2mkd_kernels.runtime import eager_only, first_order_only, require, row_major

Activation = Literal["gelu", "swiglu"]


class FfnWeights(NamedTuple):
    """The stacked weights of E networks, all of one dtype."""

    up_EUD: Tensor
    up_bias_EU: Tensor
    down_EDF: Tensor
    down_bias_ED: Tensor


@eager_only
def expert_ffn(rows_RD: Tensor, offsets_E: Tensor, weights: FfnWeights, activation: Activation = "gelu") -> Tensor:
    """Each expert's down(activation(up(row))): [R, D] -> [R, D].

    Rows at and beyond the last end offset are not read; the output and the gradient there are unspecified.
    Raises ValueError for shapes, dtypes and strides that the kernels do not take. There are no second-order gradients.
    """
    return _ExpertFfn.apply(rows_RD, offsets_E, (activation, torch.is_grad_enabled()), *weights)


@eager_only
def expert_layer(
    x_TD: Tensor, weights_TK: Tensor, gather: Gather, offsets_E: Tensor, weights: FfnWeights, activation: Activation = "gelu"
) -> Tensor:
    """Tokens -> weighted sum of their experts: [T, D], fp32 [T, K] -> [T, D]; differentiable in x, routing weights and weights.

    Raises ValueError as `expert_ffn` does.
    """
    return _ExpertLayer.apply(x_TD, weights_TK, offsets_E, (activation, torch.is_grad_enabled()), *weights, *gather)


# Both functions are told whether gradients are on: inside `forward` they never are, and `needs_input_grad` does not know of no_grad.


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, offsets_E: Tensor, how: tuple[Activation, bool], *weights: Tensor) -> Tensor:
        activation, grad_enabled = how
        rows_RD, ffn = row_major(rows_RD), _contiguous(weights)
        out_RD, z_RU = _forward(rows_RD, offsets_E, ffn, activation, None, keep_z=grad_enabled and any(ctx.needs_input_grad))
        ctx.activation = activation
        ctx.save_for_backward(rows_RD, offsets_E, z_RU, ffn.up_EUD, ffn.down_EDF)
        return out_RD

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, offsets_E, z_RU, up_EUD, down_EDF = ctx.saved_tensors
        want_rows, _, _, *wants = ctx.needs_input_grad
        grad_RD = row_major(grad_RD)
        act = _act_grad(grad_RD, down_EDF, z_RU, offsets_E, activation=ctx.activation, want_h=wants[2], want_column_sums=wants[1])
        down_grads = _down_grads(grad_RD, act, offsets_E, None, None, wants[2], wants[3])
        act = act._replace(h_RF=None)  # its memory is free before the next results need theirs
        up_grads = _up_grads(act, rows_RD, offsets_E, None, wants[0], wants[1])
        drows_RD = _rows_grad(act, up_EUD, offsets_E) if want_rows else None
        return drows_RD, None, None, *up_grads, *down_grads


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, offsets_E: Tensor, how: tuple[Activation, bool], *tensors: Any) -> Tensor:
        activation, grad_enabled = how
        ffn, gather = _contiguous(tensors[:4]), Gather(*tensors[4:])
        check_gather(gather, x_TD.shape[0], x_TD.device)
        x_TD, weights_TK = row_major(x_TD), contiguous_weights(weights_TK, gather)
        index = RowIndex(gather.order_R, gather.top_k)
        out_RD, z_RU = _forward(x_TD, offsets_E, ffn, activation, index, keep_z=grad_enabled and any(ctx.needs_input_grad))
        ctx.activation = activation
        ctx.save_for_backward(x_TD, weights_TK, offsets_E, z_RU, ffn.up_EUD, ffn.down_EDF, ffn.down_bias_ED, *gather)
        return sum_choices(out_RD, weights_TK, gather)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, offsets_E, z_RU, up_EUD, down_EDF, down_bias_ED, *plan = ctx.saved_tensors
        gather = Gather(*plan)
        index = RowIndex(gather.order_R, gather.top_k)
        want_x, want_weights, _, _, *wants = ctx.needs_input_grad
        grad_TD = row_major(grad_TD)
        act = _act_grad(
            grad_TD,
            down_EDF,
            z_RU,
            offsets_E,
            activation=ctx.activation,
            index=index,
            scale_N=weights_TK,
            want_h=wants[2],
            want_column_sums=wants[1],
            want_row_dots=want_weights,
        )
        dweights_TK = None
        if want_weights:
            assert act.row_dots is not None
            dweights_TK = routing_grad(act.row_dots, grad_TD, down_bias_ED, offsets_E, gather)
        down_grads = _down_grads(grad_TD, act, offsets_E, index, weights_TK, wants[2], wants[3])
        act = act._replace(h_RF=None)  # its memory is free before the next results need theirs
        up_grads = _up_grads(act, x_TD, offsets_E, index, wants[0], wants[1])
        dx_TD = sum_choices(_rows_grad(act, up_EUD, offsets_E), None, gather) if want_x else None
        return dx_TD, dweights_TK, None, None, *up_grads, *down_grads, None, None, None


def _contiguous(weights: tuple[Tensor, ...]) -> FfnWeights:
    """The four tensors, contiguous; raises ValueError if their shapes do not belong together."""
    ffn = FfnWeights(*(weight.contiguous() for weight in weights))
    require(ffn.up_EUD.dim() == 3 and ffn.down_EDF.dim() == 3, "expert weights must have three dimensions, [E, out, in]")
    experts, dim = (ffn.up_EUD.shape[0], ffn.up_EUD.shape[2])
    require(
        tuple(ffn.down_EDF.shape[:2]) == (experts, dim),
        f"down weight has shape {tuple(ffn.down_EDF.shape)}; [{experts}, {dim}, F] fits the up weight {tuple(ffn.up_EUD.shape)}",
    )
    return ffn


def _forward(
    x_SD: Tensor, offsets_E: Tensor, ffn: FfnWeights, activation: Activation, index: RowIndex | None, keep_z: bool
) -> tuple[Tensor, Tensor | None]:
    """(output rows, z if it is kept)."""
    up, z_RU, h_RF = prepare_gemm(
        x_SD, ffn.up_EUD, ffn.up_bias_EU, offsets_E, activation=activation, index=index, want_z=keep_z, want_h=True
    )
    assert h_RF is not None
    down, out_RD, _ = prepare_gemm(h_RF, ffn.down_EDF, ffn.down_bias_ED, offsets_E)
    assert out_RD is not None
    up.run()
    down.run()
    return out_RD, z_RU


def _act_grad(*tensors: Tensor, **options: Any) -> ActGrad:
    """`prepare_act_grad`, run. A function of its own, so that nothing else holds on to h."""
    launch, act = prepare_act_grad(*tensors, **options)
    launch.run()
    return act


def _down_grads(
    grad_SD: Tensor, act: ActGrad, offsets_E: Tensor, index: RowIndex | None, scale_N: Tensor | None, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the second matrix and its bias. The row's scale is in h already, and for the bias it is applied here."""
    dweight_EDF = None
    if want_weight:
        assert act.h_RF is not None
        launch, dweight_EDF = prepare_weight_grad(grad_SD, act.h_RF, offsets_E, grad_index=index)
        launch.run()
    return dweight_EDF, bias_grad(grad_SD, offsets_E, index, scale_N) if want_bias else None


def _up_grads(
    act: ActGrad, x_SD: Tensor, offsets_E: Tensor, index: RowIndex | None, want_weight: bool, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the first matrix and its bias."""
    dweight_EUD = dbias_EU = None
    if want_weight:
        launch, dweight_EUD = prepare_weight_grad(act.dz_RU, x_SD, offsets_E, x_index=index)
        launch.run()
    if want_bias:
        assert act.column_sums is not None
        dbias_EU = sum_tiles(act.column_sums, offsets_E, act.block_m, act.dz_RU.dtype)
    return dweight_EUD, dbias_EU


def _rows_grad(act: ActGrad, up_EUD: Tensor, offsets_E: Tensor) -> Tensor:
    """Gradient of the rows that went into the first map."""
    launch, drows_RD, _ = prepare_gemm(act.dz_RU, up_EUD, None, offsets_E, transposed=True)
    assert drows_RD is not None
    launch.run()
    return drows_RD

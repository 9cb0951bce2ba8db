"""The operators under torch.compile: it runs them as they are, with the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_kernels.combine.op import combine
from m2mkd_kernels.expert_ffn.op import FfnWeights, expert_ffn, expert_layer
from m2mkd_kernels.gather import Gather
from m2mkd_kernels.grouped_gemm.op import grouped_gemm
from m2mkd_kernels.permute.op import permute
from tests.kernels.kernel_cases import layer_inputs, make_gather


def test_values_and_gradients_are_those_without_the_compiler(device: torch.device) -> None:
    plan, offsets = make_gather([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]], 3)
    gather, offsets = Gather(plan.order_R.to(device), plan.rows_TK.to(device)), offsets.to(device)
    leaves = [leaf.to(device).requires_grad_() for leaf in layer_inputs(5, 2, 3, 8, 8, torch.float32, False)[0]]

    def every_operator(x: Tensor, routing: Tensor, *weights: Tensor) -> Tensor:
        ffn = FfnWeights(*weights)
        rows = grouped_gemm(permute(x, gather), ffn.up_EUD, ffn.up_bias_EU, offsets, activation="gelu")
        return combine(expert_ffn(rows, offsets, ffn), routing, gather) + expert_layer(x, routing, gather, offsets, ffn)

    def values(function: object) -> list[Tensor]:
        out = function(*leaves)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    got = values(torch.compile(every_operator, backend="eager"))
    assert all(torch.equal(g, w) for g, w in zip(got, values(every_operator), strict=True))

"""Every kernel's launches for one layer of a chosen size: on meta tensors to be compiled, on a GPU to be timed.

Shape letters: T tokens, K choices a token, R = T*K rows, E experts, D width, F hidden width, U = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2mkd_kernels.bias_grad.launch import BLOCK_M, prepare_row_sums, prepare_sum_tiles
from m2mkd_kernels.combine.launch import prepare_combine_backward, prepare_sum_choices
from m2mkd_kernels.configs import TileConfig
from m2mkd_kernels.expert_ffn.launch import prepare_routing_grad
from m2mkd_kernels.gather import Gather
from m2mkd_kernels.grouped_gemm.launch import RowIndex, prepare_act_grad, prepare_gemm, prepare_weight_grad
from m2mkd_kernels.permute.op import prepare_permute
from m2mkd_kernels.runtime import Launch

Activation = Literal["gelu", "swiglu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "swiglu")


class LayerSize(NamedTuple):
    """V-MoE-Base with the m2mKD authors' batch: 128 images of 197 tokens."""

    num_tokens: int = 25216
    top_k: int = 2
    num_experts: int = 8
    dim: int = 768
    hidden: int = 3072


class Sample(NamedTuple):
    """One launch, the table's kernel name (empty: it has no entry), its floating point operations and the bytes it must move.

    `op` is the operator that makes it: `expert_ffn` gathers nothing, so its launches are other programs.
    """

    name: str
    kernel: str
    launch: Launch
    flops: int
    num_bytes: int
    op: Literal["expert_layer", "expert_ffn"] = "expert_layer"


def sample_launches(
    dtype: torch.dtype,
    tiles: Mapping[str, TileConfig] | None = None,
    *,
    size: LayerSize | None = None,
    device: str = "meta",
) -> Iterator[Sample]:
    """Launches of one layer; `tiles` by kernel name, where absent the table's. Rows are spread evenly at random on a real device.

    Bytes count each operand and result once (a weight once in all), as if caches were perfect.
    """
    tiles = tiles or {}
    size = size or LayerSize()
    t, e, d, f = size.num_tokens, size.num_experts, size.dim, size.hidden
    r = t * size.top_k
    b = dtype.itemsize

    def filled(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=device).normal_(std=0.1)

    plan, offsets_E = _plan(size, device)
    index = RowIndex(plan.order_R, size.top_k)
    x_TD, h_RF, rows_RD, routing_TK = filled(t, d), filled(r, f), filled(r, d), filled(t, size.top_k, kind=torch.float32)
    down_EDF, down_bias_ED = filled(e, d, f), filled(e, d)
    gemm, act_grad, weight_grad = (tiles.get(name) for name in ("gemm", "act_grad", "weight_grad"))
    for activation in ACTIVATIONS:
        u = 2 * f if activation == "swiglu" else f
        up_EUD, z_RU = filled(e, u, d), filled(r, u)
        kernel = f"gemm_{activation}"
        up, _, _ = prepare_gemm(
            x_TD, up_EUD, filled(e, u), offsets_E, activation=activation, index=index, want_h=True, tiles=tiles.get(kernel)
        )
        yield Sample(f"up {activation}", kernel, up, 2 * r * d * u, b * (t * d + e * u * d + r * (u + f)))
        back, grads = prepare_act_grad(
            x_TD, down_EDF, z_RU, offsets_E, activation=activation, index=index, scale_N=routing_TK, want_row_dots=True, tiles=act_grad
        )
        yield Sample(f"act_grad {activation}", "act_grad", back, 2 * r * d * f, b * (t * d + e * d * f + r * (2 * u + f)))
        yield from _ffn_launches(activation, rows_RD, up_EUD, down_EDF, z_RU, offsets_E, tiles)
    yield Sample("weight grad ffn", "weight_grad", prepare_weight_grad(rows_RD, h_RF, offsets_E, tiles=weight_grad)[0],
                 2 * r * d * f, b * (r * (d + f) + e * d * f), "expert_ffn")  # fmt: skip
    gemm_flops, gemm_bytes = 2 * r * d * f, b * (r * f + e * d * f)
    yield Sample("down", "gemm", prepare_gemm(h_RF, down_EDF, down_bias_ED, offsets_E, tiles=gemm)[0], gemm_flops, gemm_bytes + b * r * d)
    rows_grad = prepare_gemm(h_RF, filled(e, f, d), None, offsets_E, transposed=True, tiles=gemm)[0]
    yield Sample("rows grad", "gemm", rows_grad, gemm_flops, gemm_bytes + b * r * d)
    down_grad = prepare_weight_grad(x_TD, h_RF, offsets_E, grad_index=index, tiles=weight_grad)[0]
    yield Sample("down grad", "weight_grad", down_grad, gemm_flops, gemm_bytes + b * t * d)
    up_grad = prepare_weight_grad(h_RF, x_TD, offsets_E, x_index=index, tiles=weight_grad)[0]
    yield Sample("up grad", "weight_grad", up_grad, gemm_flops, gemm_bytes + b * t * d)
    yield Sample("permute", "", prepare_permute(x_TD, plan)[0], 0, b * (t + r) * d)
    yield Sample("combine", "", prepare_sum_choices(rows_RD, routing_TK, plan)[0], 2 * r * d, b * (t + r) * d)
    combine_grad = prepare_combine_backward(x_TD, rows_RD, routing_TK, plan, want_rows=True, want_weights=True)[0]
    yield Sample("combine grad", "", combine_grad, 3 * r * d, b * (t + 2 * r) * d)
    assert grads.row_dots is not None
    row_dots = grads.row_dots
    routing_grad = prepare_routing_grad(row_dots, x_TD, down_bias_ED, offsets_E, plan)[0]
    yield Sample("routing grad", "", routing_grad, 2 * r * d, b * t * d + 4 * row_dots.numel())
    row_sums, sums = prepare_row_sums(x_TD, offsets_E, index, routing_TK)
    yield Sample("bias sums", "", row_sums, 2 * r * d, b * t * d)
    yield Sample("bias total", "", prepare_sum_tiles(sums, offsets_E, BLOCK_M, dtype)[0], sums.numel(), 4 * sums.numel())


def _ffn_launches(
    activation: Activation,
    rows_RD: Tensor,
    up_EUD: Tensor,
    down_EDF: Tensor,
    z_RU: Tensor,
    offsets_E: Tensor,
    tiles: Mapping[str, TileConfig],
) -> Iterator[Sample]:
    """What `expert_ffn` launches other than `expert_layer`: its rows are there, so nothing is gathered and no row has a scale."""
    (r, d), (e, u, _), f, b = rows_RD.shape, up_EUD.shape, down_EDF.shape[2], rows_RD.element_size()
    kernel = f"gemm_{activation}"
    bias_EU = up_EUD.new_empty(e, u).zero_()
    up, _, _ = prepare_gemm(rows_RD, up_EUD, bias_EU, offsets_E, activation=activation, want_h=True, tiles=tiles.get(kernel))
    yield Sample(f"up {activation} ffn", kernel, up, 2 * r * d * u, b * (r * d + e * u * d + r * (u + f)), "expert_ffn")
    back, _ = prepare_act_grad(rows_RD, down_EDF, z_RU, offsets_E, activation=activation, tiles=tiles.get("act_grad"))
    num_bytes = b * (r * d + e * d * f + r * (2 * u + f))
    yield Sample(f"act_grad {activation} ffn", "act_grad", back, 2 * r * d * f, num_bytes, "expert_ffn")


def _plan(size: LayerSize, device: str) -> tuple[Gather, Tensor]:
    """(plan, end offsets): each choice goes to an expert at random, the same on every run."""
    shape = (size.num_tokens, size.top_k)
    num_rows = size.num_tokens * size.top_k
    if device == "meta":
        order_R, rows_N = (torch.empty(num_rows, dtype=torch.int64, device=device) for _ in range(2))
        return Gather(order_R, rows_N.view(shape)), torch.empty(size.num_experts, dtype=torch.int32, device=device)
    ids_N = torch.randint(size.num_experts, (num_rows,), generator=torch.Generator().manual_seed(0)).to(device)
    order_R = ids_N.argsort(stable=True)
    ends_E = torch.bincount(ids_N, minlength=size.num_experts).cumsum(0).to(torch.int32)
    return Gather(order_R, order_R.argsort().view(shape)), ends_E

"""Backend `fused`: the whole feed-forward network in one hand-written autograd function over plain GEMMs; made for CPUs.

    for each block of one expert's rows:   z = x W1^T + b1     h = act(z)     y = h W2^T + b2

On a CPU the GEMMs are as fast as they get; what is left to win is fresh memory (the first touch of a [R, F] buffer costs several
times the activation that fills it) and copies of the stacked weight gradients. So every result is written into its final place
with out=, the [n, F] scratch buffers are used again by every block, z [R, G] is all that is saved beside the inputs, and h is computed again in backward (an activation costs 1 % of the GEMMs that it saves a buffer for).

`run_layer` does dispatch and combine too: tokens are gathered block by block, so no [R, D] copy of them exists, and
d weight = <d h, h> + <d y, b2> needs no saved output. In both the offsets are read on the host, which on a GPU waits for it;
it is correct there and not meant for it. Deterministic: sums run over blocks in order, tokens over choices in order.
Shape letters: T tokens, K choices, R rows, n rows of one block, E experts, D width, F hidden width, G = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights
from m2mkd_ds.moe.dispatch import DispatchPlan, gather_choices, row_dots, sum_choices, weighted_sum

NAME = "fused"
BLOCK_ROWS = 1024
"""Most rows handled at a time in backward: bounds the scratch buffers whatever the routing is. Forward takes an expert's rows at
once: a GEMM cut into blocks may round differently, and then the outputs would not be bit for bit those of other backends."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_aten = torch.ops.aten


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Why this backend cannot run, or an empty string."""
    if dtype not in _DTYPES:
        return f"it computes in floating point of 16 to 64 bits, not in {dtype}"
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`. Saves the rows and z. Host sync: the offsets are read."""
    tensors = (rows_RD.contiguous(), weights.up_EGD, weights.up_bias_EG, weights.down_EDF, weights.down_bias_ED)
    return _Rows.apply(*tensors, offsets_E.tolist(), weights.activation, _keeps(tensors))


def run_layer(x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
    """permute -> run -> combine in one: tokens [T, D], combine weights [T, K] -> [T, D]. Saves x, the weights and z.

    Host sync: the offsets are read.
    """
    tensors = (x_TD, weights_TK, weights.up_EGD, weights.up_bias_EG, weights.down_EDF, weights.down_bias_ED)
    return _Layer.apply(*tensors, plan, plan.offsets_E.tolist(), weights.activation, _keeps(tensors))


def _keeps(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a backward pass can come. Asked here because inside an autograd.Function the grad mode is always off."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Rows(torch.autograd.Function):
    """Rows [R, D] -> [R, D]."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, *args: Any) -> Tensor:
        *tensors, ends, activation, keep = args
        weights = _weights(tensors, activation)
        z_RG = _new_z(rows_RD.shape[0], ends, weights, keep)
        out_RD = torch.empty_like(rows_RD)
        h_nF = rows_RD.new_empty(_largest(ends), weights.hidden)
        for e, s, t in _blocks(ends):
            z_nG = z_RG[s:t] if keep else z_RG[: t - s]
            _forward_block(rows_RD[s:t], _of_expert(weights, e), z_nG, h_nF[: t - s], out_RD[s:t])
        ctx.save_for_backward(rows_RD, z_RG if keep else None, *tensors)
        ctx.ends, ctx.activation = ends, activation
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
        rows_RD, z_RG, *tensors = ctx.saved_tensors
        weights = _weights(tensors, ctx.activation)
        needs_rows, *needs_weights = ctx.needs_input_grad[:5]
        grads = _WeightGrads.new(weights, needs_weights, ctx.ends)
        grad_RD = grads_out[0].contiguous()
        grad_rows_RD = torch.empty_like(rows_RD) if needs_rows else None
        most_rows = _backward_rows(weights)
        scratch = _new_scratch(_largest(ctx.ends, most_rows), weights)
        for e, s, t in _blocks(ctx.ends, most_rows):
            one = _of_expert(weights, e)
            hidden = scratch.cut(t - s)
            _activate(z_RG[s:t], weights.activation, out=hidden.h)
            grads.add_down(e, grad_RD[s:t], hidden.h)
            torch.mm(grad_RD[s:t], one.down_DF, out=hidden.dh)
            _backward_block(rows_RD[s:t], z_RG[s:t], one, hidden, grads, None if grad_rows_RD is None else grad_rows_RD[s:t])
        return grad_rows_RD, *grads.tensors(), None, None, None


class _Layer(torch.autograd.Function):
    """Tokens [T, D] and combine weights [T, K] -> [T, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, *args: Any) -> Tensor:
        *tensors, plan, ends, activation, keep = args
        weights = _weights(tensors, activation)
        num_rows, dim = plan.order_R.shape[0], x_TD.shape[1]
        tokens_R = plan.row_tokens()
        z_RG = _new_z(num_rows, ends, weights, keep)
        rows_RD = x_TD.new_empty(num_rows, dim)
        h_nF = x_TD.new_empty(_largest(ends), weights.hidden)
        x_nD = x_TD.new_empty(h_nF.shape[0], dim)
        for e, s, t in _blocks(ends):
            torch.index_select(x_TD, 0, tokens_R[s:t], out=x_nD[: t - s])
            z_nG = z_RG[s:t] if keep else z_RG[: t - s]
            _forward_block(x_nD[: t - s], _of_expert(weights, e), z_nG, h_nF[: t - s], rows_RD[s:t])
        ctx.save_for_backward(x_TD, weights_TK, z_RG if keep else None, *tensors)
        ctx.plan, ctx.ends, ctx.activation = plan, ends, activation
        return weighted_sum(rows_RD, weights_TK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
        x_TD, weights_TK, z_RG, *tensors = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        weights = _weights(tensors, ctx.activation)
        needs_x, needs_combine, *needs_weights = ctx.needs_input_grad[:6]
        grads = _WeightGrads.new(weights, needs_weights, ctx.ends)
        grad_TD = grads_out[0]
        num_rows, dim = plan.order_R.shape[0], x_TD.shape[1]
        tokens_R, weights_R = plan.row_tokens(), weights_TK.reshape(-1).index_select(0, plan.order_R)
        grad_rows_RD = x_TD.new_empty(num_rows, dim) if needs_x else None
        grad_weights_R = weights_TK.new_zeros(num_rows)
        most_rows = _backward_rows(weights)
        scratch = _new_scratch(_largest(ctx.ends, most_rows), weights)
        both_2nD = x_TD.new_empty(2, scratch.h.shape[0], dim)
        for e, s, t in _blocks(ctx.ends, most_rows):
            one, hidden = _of_expert(weights, e), scratch.cut(t - s)
            x_nD, g_nD = both_2nD[:, : t - s].unbind(0)
            torch.index_select(x_TD, 0, tokens_R[s:t], out=x_nD)
            torch.index_select(grad_TD, 0, tokens_R[s:t], out=g_nD)
            _activate(z_RG[s:t], weights.activation, out=hidden.h)
            torch.mm(g_nD, one.down_DF, out=hidden.dh)  # before the combine weight: this is what that weight's gradient needs
            if needs_combine:
                bias_dots_n = g_nD.to(weights_TK.dtype) @ one.down_bias_D.to(weights_TK.dtype)
                grad_weights_R[s:t] = row_dots(hidden.dh, hidden.h, weights_TK.dtype) + bias_dots_n
            w_n1 = weights_R[s:t, None]
            torch.mul(g_nD, w_n1, out=g_nD)
            torch.mul(hidden.dh, w_n1, out=hidden.dh)
            grads.add_down(e, g_nD, hidden.h)
            _backward_block(x_nD, z_RG[s:t], one, hidden, grads, None if grad_rows_RD is None else grad_rows_RD[s:t])
        grad_x_TD = None if grad_rows_RD is None else sum_choices(grad_rows_RD, plan)
        grad_weights_TK = gather_choices(grad_weights_R, plan) if needs_combine else None
        return grad_x_TD, grad_weights_TK, *grads.tensors(), None, None, None, None


class _Expert(NamedTuple):
    """One expert's share of the weights."""

    number: int
    up_GD: Tensor
    up_bias_G: Tensor
    down_DF: Tensor
    down_bias_D: Tensor
    activation: Activation


def _weights(tensors: Sequence[Tensor], activation: Activation) -> ExpertWeights:
    up_EGD, up_bias_EG, down_EDF, down_bias_ED = tensors
    return ExpertWeights(up_EGD, up_bias_EG, down_EDF, down_bias_ED, activation)


def _of_expert(weights: ExpertWeights, e: int) -> _Expert:
    return _Expert(e, weights.up_EGD[e], weights.up_bias_EG[e], weights.down_EDF[e], weights.down_bias_ED[e], weights.activation)


class _Scratch(NamedTuple):
    """Buffers of one block, overwritten by the next: activation h and its gradient dh [n, F]; dz [n, G], for gelu the same as dh."""

    h: Tensor
    dh: Tensor
    dz: Tensor

    def cut(self, num_rows: int) -> _Scratch:
        return _Scratch(self.h[:num_rows], self.dh[:num_rows], self.dz[:num_rows])


def _blocks(ends: list[int], most_rows: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every block of at most that many rows, in order; none for an expert without rows."""
    start = 0
    for e, end in enumerate(ends):
        for s in range(start, end, most_rows or max(end, 1)):
            yield e, s, min(s + most_rows, end) if most_rows else end
        start = end


def _backward_rows(weights: ExpertWeights) -> int | None:
    """Rows a block in backward; no limit in 16 bits, where the weight gradients would be rounded once more for every block."""
    return BLOCK_ROWS if weights.down_EDF.dtype.itemsize >= 4 else None


def _largest(ends: list[int], most_rows: int | None = None) -> int:
    return max((t - s for _, s, t in _blocks(ends, most_rows)), default=0)


def _new_z(num_rows: int, ends: list[int], weights: ExpertWeights, keep: bool) -> Tensor:
    """Pre-activations: of all rows if backward needs them, else one block's."""
    return weights.up_EGD.new_empty(num_rows if keep else _largest(ends), weights.up_EGD.shape[1])


def _new_scratch(num_rows: int, weights: ExpertWeights) -> _Scratch:
    """The buffers of a backward pass."""
    h, dh = (weights.down_EDF.new_empty(num_rows, weights.hidden) for _ in range(2))
    return _Scratch(h, dh, dh if weights.activation == "gelu" else h.new_empty(num_rows, 2 * weights.hidden))


def _forward_block(x_nD: Tensor, one: _Expert, z_nG: Tensor, h_nF: Tensor, out_nD: Tensor) -> None:
    """Fills z, h and out."""
    # The bias last, not addmm, which starts the sum with it: so the bits are those of `reference` and `grouped`, at no cost.
    torch.mm(x_nD, one.up_GD.t(), out=z_nG).add_(one.up_bias_G)
    _activate(z_nG, one.activation, out=h_nF)
    torch.mm(h_nF, one.down_DF.t(), out=out_nD).add_(one.down_bias_D)


def _backward_block(x_nD: Tensor, z_nG: Tensor, one: _Expert, hidden: _Scratch, grads: _WeightGrads, grad_x_nD: Tensor | None) -> None:
    """From dh (in `hidden`) to dz, the gradients of the first map and, if it is wanted, of its input. Overwrites `hidden`."""
    _activate_backward(z_nG, one.activation, hidden)
    grads.add_up(one.number, hidden.dz, x_nD)
    if grad_x_nD is not None:
        torch.mm(hidden.dz, one.up_GD, out=grad_x_nD)


def _activate(z_nG: Tensor, activation: Activation, *, out: Tensor) -> None:
    """h = act(z)."""
    if activation == "gelu":
        _aten.gelu.out(z_nG, out=out)
        return
    gate_nF, value_nF = z_nG.chunk(2, dim=-1)
    _aten.silu.out(gate_nF, out=out)
    out.mul_(value_nF)


def _activate_backward(z_nG: Tensor, activation: Activation, hidden: _Scratch) -> None:
    """dz = dh * act'(z); h and dh are lost. z is left alone: a second backward pass needs it."""
    if activation == "gelu":
        _aten.gelu_backward.grad_input(hidden.dh, z_nG, grad_input=hidden.dz)
        return
    gate_nF, value_nF = z_nG.chunk(2, dim=-1)
    dgate_nF, dvalue_nF = hidden.dz.chunk(2, dim=-1)
    _aten.silu.out(gate_nF, out=hidden.h)
    torch.mul(hidden.dh, hidden.h, out=dvalue_nF)
    hidden.dh.mul_(value_nF)
    _aten.silu_backward.grad_input(hidden.dh, gate_nF, grad_input=dgate_nF)


class _WeightGrads:
    """Stacked gradients of the four weights (None for one that needs none), filled block by block in place."""

    def __init__(self, up_EGD: Tensor | None, up_bias_EG: Tensor | None, down_EDF: Tensor | None, down_bias_ED: Tensor | None) -> None:
        self.up_EGD, self.up_bias_EG, self.down_EDF, self.down_bias_ED = up_EGD, up_bias_EG, down_EDF, down_bias_ED
        self._begun: set[tuple[str, int]] = set()

    @classmethod
    def new(cls, weights: ExpertWeights, needs: list[bool], ends: list[int]) -> _WeightGrads:
        """Uninitialised but for the experts without rows, whose gradients are zero."""
        grads = cls(*(torch.empty_like(w) if needed else None for w, needed in zip(weights[:4], needs, strict=True)))
        empty = [e for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start == end]
        for grad in grads.tensors():
            if grad is not None:
                for e in empty:
                    grad[e].zero_()
        return grads

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.up_EGD, self.up_bias_EG, self.down_EDF, self.down_bias_ED

    def add_down(self, e: int, grad_nD: Tensor, h_nF: Tensor) -> None:
        self._add("down", e, self.down_EDF, self.down_bias_ED, grad_nD, h_nF)

    def add_up(self, e: int, dz_nG: Tensor, x_nD: Tensor) -> None:
        self._add("up", e, self.up_EGD, self.up_bias_EG, dz_nG, x_nD)

    def _add(self, which: str, e: int, weight_EOI: Tensor | None, bias_EO: Tensor | None, grad_nO: Tensor, input_nI: Tensor) -> None:
        """weight[e] (+)= grad^T input, bias[e] (+)= sum of grad; the first block of an expert writes, the later ones add."""
        first = (which, e) not in self._begun
        self._begun.add((which, e))
        if weight_EOI is not None:
            weight_OI = weight_EOI[e]
            if first:
                torch.mm(grad_nO.t(), input_nI, out=weight_OI)
            else:
                weight_OI.addmm_(grad_nO.t(), input_nI)
        if bias_EO is not None:
            if first:
                torch.sum(grad_nO, 0, out=bias_EO[e])
            else:
                bias_EO[e].add_(grad_nO.sum(0))

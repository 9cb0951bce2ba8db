"""Backend `fused`: the whole feed-forward network in one hand-written autograd function over plain GEMMs; made for CPUs.

    for each block of one expert's rows:   z = x W1^T + b1     h = act(z)     y = h W2^T + b2

On a CPU the GEMMs are as fast as they get; what is left to win is fresh memory (the first touch of a [R, F] buffer costs several
times the activation that fills it) and copies of the stacked weight gradients. So results are written into their final place with
out=, the [n, F] scratch buffers of backward are used again by every block, z is all that is saved beside the inputs (one tensor an
expert, freed as backward passes it), and h is computed again in backward (an activation costs about 1 % of the GEMMs around it).

`run_layer` does dispatch and combine too: tokens are gathered block by block, so no [R, D] copy of them exists, and
d weight = <d h, h> + <d y, b2> needs no saved output. In both the offsets are read on the host, which on a GPU waits for it;
it is correct there and not meant for it. Deterministic: sums run over blocks in order, tokens over choices in order.
Shape letters: T tokens, K choices, R rows, n rows of one block, E experts, D width, F hidden width, G = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
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
        out_RD = torch.empty_like(rows_RD)
        saved_z = []
        for e, start, end in _segments(ends):
            z_nG = _forward_expert(rows_RD[start:end], _of_expert(weights, e), out_RD[start:end])
            if keep:
                saved_z.append(z_nG)
        ctx.save_for_backward(rows_RD, *tensors, *saved_z)
        ctx.ends, ctx.activation = ends, activation
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
        rows_RD, *tensors, saved_z = _take_saved(ctx, 5)
        weights = _weights(tensors, ctx.activation)
        needs_rows, *needs_weights = ctx.needs_input_grad[:5]
        grads = _WeightGrads.new(weights, needs_weights, ctx.ends)
        grad_RD = grads_out[0].contiguous()
        grad_rows_RD = torch.empty_like(rows_RD) if needs_rows else None
        scratch = _new_scratch(ctx.ends, weights)
        for e, s, t, z_nG in _backward_blocks(ctx.ends, saved_z, weights):
            one, hidden = _of_expert(weights, e), scratch.cut(t - s)
            _activate(z_nG, one.activation, out=hidden.h)
            grads.add_down(e, grad_RD[s:t], hidden.h)
            torch.mm(grad_RD[s:t], one.down_DF, out=hidden.dh)
            _backward_block(rows_RD[s:t], z_nG, one, hidden, grads, None if grad_rows_RD is None else grad_rows_RD[s:t])
        return grad_rows_RD, *grads.tensors(), None, None, None


class _Layer(torch.autograd.Function):
    """Tokens [T, D] and combine weights [T, K] -> [T, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, *args: Any) -> Tensor:
        *tensors, plan, ends, activation, keep = args
        weights = _weights(tensors, activation)
        tokens_R = plan.row_tokens()
        rows_RD = x_TD.new_empty(tokens_R.shape[0], x_TD.shape[1])
        saved_z = []
        for e, start, end in _segments(ends):
            x_nD = x_TD.index_select(0, tokens_R[start:end])
            z_nG = _forward_expert(x_nD, _of_expert(weights, e), rows_RD[start:end])
            if keep:
                saved_z.append(z_nG)
        ctx.save_for_backward(x_TD, weights_TK, *tensors, *saved_z)
        ctx.plan, ctx.ends, ctx.activation = plan, ends, activation
        return weighted_sum(rows_RD, weights_TK, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Any, ...]:
        x_TD, weights_TK, *tensors, saved_z = _take_saved(ctx, 6)
        plan: DispatchPlan = ctx.plan
        weights = _weights(tensors, ctx.activation)
        needs_x, needs_combine, *needs_weights = ctx.needs_input_grad[:6]
        grads = _WeightGrads.new(weights, needs_weights, ctx.ends)
        grad_TD = grads_out[0]
        tokens_R, weights_R = plan.row_tokens(), weights_TK.reshape(-1).index_select(0, plan.order_R)
        grad_rows_RD = x_TD.new_empty(tokens_R.shape[0], x_TD.shape[1]) if needs_x else None
        grad_weights_R = weights_TK.new_zeros(tokens_R.shape[0])
        scratch = _new_scratch(ctx.ends, weights)
        both_2nD = x_TD.new_empty(2, scratch.h.shape[0], x_TD.shape[1])
        for e, s, t, z_nG in _backward_blocks(ctx.ends, saved_z, weights):
            one, hidden = _of_expert(weights, e), scratch.cut(t - s)
            x_nD, g_nD = both_2nD[:, : t - s].unbind(0)
            torch.index_select(x_TD, 0, tokens_R[s:t], out=x_nD)
            torch.index_select(grad_TD, 0, tokens_R[s:t], out=g_nD)
            _activate(z_nG, one.activation, out=hidden.h)
            torch.mm(g_nD, one.down_DF, out=hidden.dh)  # before the combine weight: this is what that weight's gradient needs
            if needs_combine:
                bias_dots_n = g_nD.to(weights_TK.dtype) @ one.down_bias_D.to(weights_TK.dtype)
                grad_weights_R[s:t] = row_dots(hidden.dh, hidden.h, weights_TK.dtype) + bias_dots_n
            w_n1 = weights_R[s:t, None]
            torch.mul(g_nD, w_n1, out=g_nD)
            torch.mul(hidden.dh, w_n1, out=hidden.dh)
            grads.add_down(e, g_nD, hidden.h)
            _backward_block(x_nD, z_nG, one, hidden, grads, None if grad_rows_RD is None else grad_rows_RD[s:t])
        del scratch, both_2nD
        grad_x_TD = None if grad_rows_RD is None else sum_choices(grad_rows_RD, plan)
        grad_weights_TK = gather_choices(grad_weights_R, plan) if needs_combine else None
        return grad_x_TD, grad_weights_TK, *grads.tensors(), None, None, None, None


def _take_saved(ctx: Any, num_plain: int) -> list[Any]:
    """The first `num_plain` saved tensors, and a list of the others (z by expert) that holds their last reference.

    Autograd would keep all z until the backward pass is over; so each is free once its expert is done, unless the graph is retained.
    """
    saved = list(ctx.saved_tensors)
    ctx.maybe_clear_saved_tensors()
    return [*saved[:num_plain], saved[num_plain:]]


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


def _segments(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        if start < end:
            yield e, start, end


def _block_rows(weights: ExpertWeights, num_rows: int) -> int:
    """Rows a block in backward; no limit in 16 bits, where the weight gradients would be rounded once more for every block."""
    return min(num_rows, BLOCK_ROWS) if weights.down_EDF.dtype.itemsize >= 4 else num_rows


def _backward_blocks(ends: list[int], saved_z: list[Tensor], weights: ExpertWeights) -> Iterator[tuple[int, int, int, Tensor]]:
    """(expert, first row, end row, z of these rows) of every block, in order of rows. Empties `saved_z`."""
    for e, start, end in _segments(ends):
        z_nG = saved_z.pop(0)
        size = _block_rows(weights, end - start)
        for s in range(start, end, size):
            t = min(s + size, end)
            yield e, s, t, z_nG[s - start : t - start]
        del z_nG


def _new_scratch(ends: list[int], weights: ExpertWeights) -> _Scratch:
    """The buffers of a backward pass."""
    size = max((_block_rows(weights, end - start) for _, start, end in _segments(ends)), default=0)
    h, dh = (weights.down_EDF.new_empty(size, weights.hidden) for _ in range(2))
    return _Scratch(h, dh, dh if weights.activation == "gelu" else h.new_empty(size, 2 * weights.hidden))


def _forward_expert(x_nD: Tensor, one: _Expert, out_nD: Tensor) -> Tensor:
    """Fills out; returns z."""
    # The bias last, not addmm, which starts the sum with it: so the bits are those of `reference` and `grouped`, at no cost.
    z_nG = torch.mm(x_nD, one.up_GD.t()).add_(one.up_bias_G)
    h_nF = z_nG.new_empty(x_nD.shape[0], one.down_DF.shape[1])
    _activate(z_nG, one.activation, out=h_nF)
    torch.mm(h_nF, one.down_DF.t(), out=out_nD).add_(one.down_bias_D)
    return z_nG


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
        empty = [e for e, (start, end) in enumerate(pairwise([0, *ends])) if start == end]
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

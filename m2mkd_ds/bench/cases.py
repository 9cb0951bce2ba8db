"""A case: one peer at one level, ready to run forward and backward; and an absent one, with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from m2mkd_ds.bench.workload import Workload
from m2mkd_ds.moe.backends import BACKENDS, Activation, Backend, ExpertWeights
from m2mkd_ds.moe.backends.contract import activate


@dataclass(frozen=True)
class Absent:
    """A peer that cannot run here."""

    peer: str
    reason: str


@dataclass(frozen=True)
class Ran:
    """What a forward pass gives back."""

    output: Tensor
    load_E: Tensor | None = None
    """Choices of each expert by the peer's own gate, before any is dropped; None where the routing was handed to it."""


@dataclass(frozen=True)
class Case:
    """`forward` makes the output from `leaves`; `backward` runs from it. Both are timed."""

    peer: str
    forward: Callable[[], Ran]
    backward: Callable[[Tensor], None]
    leaves: Sequence[Tensor]
    """Everything that gets a gradient: emptied before each pass, so that no pass adds to the gradients of another."""
    kept_rows: int
    """Rows whose result counts."""
    computed_rows: int
    """Rows that go through the matmuls, padding included."""
    note: str = ""
    gradients: Callable[[], dict[str, Tensor]] | None = field(default=None)
    """Gradients by canonical name after a pass (`x` for the input's), to hold against fp64; None where no comparison makes sense."""

    def clear(self) -> None:
        """Forget all gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def ffn_cases(work: Workload, names: Sequence[str]) -> list[Case | Absent]:
    """The expert networks alone, on rows grouped by expert."""
    from m2mkd_ds.distributed.external import deepspeed_triton

    makers: dict[str, Callable[[], Case | Absent]] = {
        "gemm": lambda: gemm_case(work),
        "dense": lambda: _dense_rows(work),
        **{name: partial(_backend_rows, work, name, backend) for name, backend in BACKENDS.items()},
        "deepspeed_triton": lambda: _backend_rows(work, "deepspeed_triton", cast(Backend, deepspeed_triton)),
    }
    return [makers[name]() for name in names if name in makers]


def why_not(backend: Backend, work: Workload) -> str:
    """Why a backend cannot do this workload, or an empty string."""
    o, x = work.options, work.x_TD
    return backend.why_not(device=x.device, dtype=x.dtype, dim=o.dim, hidden=o.hidden, activation=o.activation)


def computed_rows(backend_name: str, work: Workload) -> int:
    """Rows that a backend's matmuls run over: `padded` and `tutel_dispatch` pad every expert to the busiest, others over no padding."""
    return len(work.load) * max(work.load) if backend_name in ("padded", "tutel_dispatch") else sum(work.load)


def gemm_case(work: Workload) -> Case:
    """The two dense matmuls of one expert over all R rows."""
    leaf_RD, w = work.rows_RD.detach().clone().requires_grad_(), _one_expert(work)
    # swiglu's two maps are one matmul here, of which the first half goes on.
    return Case(
        "gemm",
        lambda: Ran((leaf_RD @ w.up_EGD[0].T)[:, : w.hidden] @ w.down_EDF[0].T),
        lambda y: y.backward(work.grad_RD),
        [leaf_RD, w.up_EGD, w.down_EDF],
        kept_rows=leaf_RD.shape[0],
        computed_rows=leaf_RD.shape[0],
        note="the dense matmuls alone, no bias, no activation: what the hardware gives at this shape",
    )


def _backend_rows(work: Workload, name: str, backend: Backend) -> Case | Absent:
    reason = why_not(backend, work)
    if reason:
        return Absent(name, reason)
    leaf_RD = work.rows_RD.detach().clone().requires_grad_()
    weights = work.expert_weights
    experts = work.layer.experts

    def gradients() -> dict[str, Tensor]:
        return {"x": grad_of(leaf_RD), **{f"experts.{n}": grad_of(p) for n, p in experts.named_parameters()}}

    return Case(
        name,
        lambda: Ran(backend.run(leaf_RD, work.plan.offsets_E, weights)),
        lambda y: y.backward(work.grad_RD),
        [leaf_RD, *weights[:4]],
        kept_rows=leaf_RD.shape[0],
        computed_rows=computed_rows(name, work),
        gradients=gradients,
    )


def stack(tensors: Sequence[Tensor], activation: Activation) -> ExpertWeights:
    """The four tensors, in the order of ExpertWeights."""
    up_EGD, up_bias_EG, down_EDF, down_bias_ED = tensors
    return ExpertWeights(up_EGD, up_bias_EG, down_EDF, down_bias_ED, activation)


def _one_expert(work: Workload) -> ExpertWeights:
    """Expert 0 as a stack of one, with leaves of its own."""
    w = work.expert_weights
    return stack([t[:1].detach().clone().requires_grad_() for t in w[:4]], w.activation)


def _dense_rows(work: Workload) -> Case:
    leaf_RD, w = work.rows_RD.detach().clone().requires_grad_(), _one_expert(work)
    note = "one expert for all rows: equal FLOPs, no routing; the upper bound"
    return dense_case("dense", leaf_RD, w, work.grad_RD, leaf_RD.shape[0], note)


def dense_case(peer: str, leaf: Tensor, w: ExpertWeights, grad: Tensor, kept_rows: int, note: str) -> Case:
    """One feed-forward network (a stack of one) over all rows."""

    def forward() -> Ran:
        up = torch.nn.functional.linear(leaf, w.up_EGD[0], w.up_bias_EG[0])
        return Ran(torch.nn.functional.linear(activate(up, w.activation), w.down_EDF[0], w.down_bias_ED[0]))

    return Case(peer, forward, lambda y: y.backward(grad), [leaf, *w[:4]], kept_rows, kept_rows, note)


def grad_of(tensor: Tensor) -> Tensor:
    """Its gradient; zeros where none came."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

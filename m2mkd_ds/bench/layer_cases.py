"""Cases of the level `layer`: router, dispatch, experts and combine; ours with every backend, and the peers' own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m2mkd_ds.bench.cases import Absent, Case, Ran, computed_rows, dense_case, gemm_case, grad_of, stack, why_not
from m2mkd_ds.bench.spread_cases import deepspeed_spread_case, spread_case
from m2mkd_ds.bench.workload import Workload
from m2mkd_ds.distributed.world import World
from m2mkd_ds.moe.backends import BACKENDS
from m2mkd_ds.moe.dispatch import combine, make_plan, permute

if TYPE_CHECKING:
    from m2mkd_ds.distributed.external.deepspeed_moe import DeepSpeedMoE
    from m2mkd_ds.distributed.external.tutel import TutelMoE


def layer_cases(work: Workload, names: Sequence[str], world: World) -> list[Case | Absent]:
    """Cases of the named peers that have one at this level, then the parts of our layer."""
    makers: dict[str, Callable[[], Case | Absent]] = {
        "gemm": lambda: gemm_case(work),
        "dense": lambda: _dense_tokens(work),
        **{name: partial(_ours, work, name) for name in BACKENDS},
        "deepspeed": lambda: _deepspeed(work, None),
        "deepspeed_capacity": lambda: _deepspeed(work, 1.0),
        "expert_parallel": lambda: spread_case(work, world),
        "deepspeed_expert_parallel": lambda: deepspeed_spread_case(work, world),
        "tutel": lambda: _tutel(work),
        "scattermoe": lambda: _scattermoe(work),
    }
    return [*(makers[name]() for name in names if name in makers), *_parts(work)]


def _dense_tokens(work: Workload) -> Case:
    o, x = work.options, work.x_TD
    hidden = o.top_k * o.hidden
    up_width = 2 * hidden if o.activation == "swiglu" else hidden
    generator = torch.Generator().manual_seed(o.seed)
    shapes = ((1, up_width, o.dim), (1, up_width), (1, o.dim, hidden), (1, o.dim))
    tensors = [(torch.randn(s, generator=generator) * 0.02).to(x.device, x.dtype).requires_grad_() for s in shapes]
    w = stack(tensors, o.activation)
    note = f"one dense network of hidden width {hidden}: equal FLOPs, no routing; the upper bound"
    return dense_case("dense", x.detach().clone().requires_grad_(), w, work.grad_TD, o.tokens * o.top_k, note)


def _ours(work: Workload, name: str) -> Case | Absent:
    reason = why_not(BACKENDS[name], work)
    if reason:
        return Absent(name, reason)
    leaf_TD, layer = work.x_TD.detach().clone().requires_grad_(), work.layer

    def forward() -> Ran:
        layer.experts.backend = name  # one layer for all backends: weights and gradients are there once
        y_BLD, routing = layer(leaf_TD[None])
        return Ran(y_BLD[0], routing.stats.load_E)

    def gradients() -> dict[str, Tensor]:
        return {"x": grad_of(leaf_TD), **{n: grad_of(p) for n, p in layer.named_parameters()}}

    return Case(
        name,
        forward,
        lambda y: y.backward(work.grad_TD),
        [leaf_TD, *layer.parameters()],
        kept_rows=sum(work.load),
        computed_rows=computed_rows(name, work),
        gradients=gradients,
    )


def _deepspeed(work: Workload, capacity_factor: float | None) -> Case | Absent:
    from m2mkd_ds.distributed.external.deepspeed_moe import DeepSpeedMoE

    peer = "deepspeed" if capacity_factor is None else "deepspeed_capacity"
    if work.options.activation != "gelu":
        return Absent(peer, "its experts stand here with gelu only")
    layer = DeepSpeedMoE(work.shape, capacity_factor=capacity_factor).to(work.x_TD.device, work.x_TD.dtype)
    capacity = layer.capacity(work.options.tokens, max(work.load))
    if capacity_factor is None:
        note = f"stock DeepSpeed MoE with drop_tokens=False, to do the same work: every expert padded to {capacity} rows"
    else:
        note = (
            f"stock DeepSpeed MoE with its default capacity_factor=1.0: {capacity} rows an expert, the rest is dropped (not the same work)"
        )
    return _foreign(work, peer, layer, capacity, note)


def _tutel(work: Workload) -> Case | Absent:
    from m2mkd_ds.distributed.external import tutel

    if work.options.activation != "gelu":
        return Absent("tutel", "its experts stand here with gelu only")
    reason = tutel.why_not(device=work.x_TD.device, dtype=work.x_TD.dtype)
    if not reason and work.options.dim % 2:
        reason = f"Tutel takes even widths only, not {work.options.dim}"
    if reason:
        return Absent("tutel", reason)
    layer = tutel.TutelMoE(work.shape).to(work.x_TD.device, work.x_TD.dtype)
    capacity = layer.capacity(work.options.tokens, max(work.load))
    return _foreign(work, "tutel", layer, capacity, f"dropless by padding: every expert padded to {capacity} rows")


def _foreign(work: Workload, peer: str, layer: DeepSpeedMoE | TutelMoE, capacity: int, note: str) -> Case:
    """A peer's whole layer with the weights of ours."""
    layer.load_canonical(work.layer.state_dict())
    leaf_TD = work.x_TD.detach().clone().requires_grad_()
    kept_rows = sum(min(n, capacity) for n in work.load)

    def forward() -> Ran:
        y_BLD, _, load_E = layer(leaf_TD[None])
        return Ran(y_BLD[0], load_E)

    def gradients() -> dict[str, Tensor]:
        return {"x": grad_of(leaf_TD), **layer.to_canonical(grads=True)}

    return Case(
        peer,
        forward,
        lambda y: y.backward(work.grad_TD),
        [leaf_TD, *layer.parameters()],
        kept_rows,
        computed_rows=capacity * work.options.experts,
        note=note,
        gradients=gradients if kept_rows == sum(work.load) else None,  # what drops tokens computes something else
    )


def _scattermoe(work: Workload) -> Case | Absent:
    from m2mkd_ds.distributed.external import scattermoe

    if work.options.activation != "gelu":
        return Absent("scattermoe", "its experts stand here with gelu only")
    reason = scattermoe.why_not(device=work.x_TD.device, dtype=work.x_TD.dtype)
    if reason:
        return Absent("scattermoe", reason)
    experts = scattermoe.ScatterMoEExperts(work.shape).to(work.x_TD.device, work.x_TD.dtype)
    experts.load_canonical(work.layer.state_dict())
    leaf_TD, router = work.x_TD.detach().clone().requires_grad_(), work.layer.router

    def forward() -> Ran:
        routing = router(leaf_TD)
        return Ran(experts(leaf_TD, routing.weights_TK, routing.expert_ids_TK), routing.stats.load_E)

    def gradients() -> dict[str, Tensor]:
        named = {"x": leaf_TD, "router.weight": router.weight, **experts.named()}
        return {name: grad_of(tensor) for name, tensor in named.items()}

    return Case(
        "scattermoe",
        forward,
        lambda y: y.backward(work.grad_TD),
        [leaf_TD, router.weight, *experts.parameters()],
        kept_rows=sum(work.load),
        computed_rows=sum(work.load),
        note="ScatterMoE's experts behind our router",
        gradients=gradients,
    )


def _parts(work: Workload) -> list[Case | Absent]:
    """Router, dispatch and combine of our layer, each alone on the same numbers."""
    num_rows, ids_TK, router = sum(work.load), work.expert_ids_TK, work.layer.router
    x_TD, rows_RD, weights_TK = (t.detach().clone().requires_grad_() for t in (work.x_TD, work.rows_RD, work.weights_TK))
    grad_TK = torch.randn(weights_TK.shape, generator=torch.Generator().manual_seed(0)).to(weights_TK)
    router_case = Case(
        "part:router",
        lambda: Ran(router(x_TD).weights_TK),
        lambda y: y.backward(grad_TK.to(y.dtype)),
        [x_TD, router.weight],
        num_rows,
        num_rows,
    )
    dispatch_case = Case(
        "part:dispatch",
        lambda: Ran(permute(x_TD, make_plan(ids_TK, work.options.experts))),
        lambda y: y.backward(work.grad_RD),
        [x_TD],
        num_rows,
        num_rows,
    )
    combine_case = Case(
        "part:combine",
        lambda: Ran(combine(rows_RD, weights_TK, work.plan)),
        lambda y: y.backward(work.grad_TD),
        [rows_RD, weights_TK],
        num_rows,
        num_rows,
    )
    return [router_case, dispatch_case, combine_case]

"""Tokens and weights for which every gate under test chooses the same experts.

The gate's rows are orthonormal directions (times a scale); a token is noise without those directions plus a strong component along
the directions of its wanted experts. So a softmax top-k gate chooses as planned, whoever computes it and in any dtype, and the
peers need no switch for forced routing. Shape letters: T tokens, D width, E experts, K experts a token, R = T*K rows, F hidden width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from m2mkd_ds.bench.options import ExpertBench, Routing
from m2mkd_ds.distributed.external.canonical import LayerShape, matching_router
from m2mkd_ds.moe.backends import ExpertWeights
from m2mkd_ds.moe.dispatch import DispatchPlan, make_plan, permute
from m2mkd_ds.moe.layer import MoELayer

GAP = 1.5
"""Distance between the logits of a token's first, second, ... choice and of those not chosen; the noise on each is below a third."""


@dataclass(frozen=True)
class Workload:
    """One routing of one rank: what every peer gets, in the dtype of the run and on its device."""

    routing: Routing
    options: ExpertBench
    layer: MoELayer
    """Our layer, whose weights are the canonical ones that the peers copy; cases switch its backend."""
    x_TD: Tensor
    grad_TD: Tensor
    """Gradient that comes back to the layer's output."""
    expert_ids_TK: Tensor
    weights_TK: Tensor
    plan: DispatchPlan
    rows_RD: Tensor
    grad_RD: Tensor

    @property
    def shape(self) -> LayerShape:
        o = self.options
        return LayerShape(o.dim, o.hidden, o.experts, o.top_k)

    @property
    def load(self) -> list[int]:
        """Rows of each expert."""
        ends = self.plan.offsets_E.tolist()  # host sync
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def expert_weights(self) -> ExpertWeights:
        """The layer's own parameters, as a backend gets them."""
        e = self.layer.experts
        return ExpertWeights(e.up_proj, e.up_proj_bias, e.down_proj, e.down_proj_bias, e.activation)


def make_workload(options: ExpertBench, routing: Routing, *, rank: int, device: torch.device, dtype: torch.dtype) -> Workload:
    """Weights by the seed alone (all ranks hold the same), tokens by seed and rank."""
    o = options
    layer = MoELayer(o.dim, o.hidden, o.experts, matching_router(o.top_k), "reference", o.activation, _generator(o.seed, "weights"))
    generator = _generator(o.seed, f"{routing}/{rank}")
    with torch.no_grad():
        for bias in (layer.experts.up_proj_bias, layer.experts.down_proj_bias):
            bias.normal_(std=0.02, generator=_generator(o.seed, "biases"))
        if routing == "router":
            x_TD = torch.randn(o.tokens, o.dim, generator=generator)
        else:
            directions_ED = _directions(o)
            layer.router.weight.copy_(directions_ED)
            x_TD = steered_tokens(wanted_experts(o, routing, generator), directions_ED, generator)
    # Cast first, route then: what the gates see is the rounded tokens.
    layer = layer.to(device, dtype)
    x_TD = x_TD.to(device, dtype)
    with torch.no_grad():
        decision = layer.router(x_TD)
        plan = make_plan(decision.expert_ids_TK, o.experts)
        rows_RD = permute(x_TD, plan)
    grad_TD = torch.randn(o.tokens, o.dim, generator=generator).to(device, dtype)
    grad_RD = torch.randn(o.tokens * o.top_k, o.dim, generator=generator).to(device, dtype)
    return Workload(routing, o, layer, x_TD, grad_TD, decision.expert_ids_TK, decision.weights_TK.to(torch.float32), plan, rows_RD, grad_RD)


def wanted_experts(options: ExpertBench, routing: Routing, generator: torch.Generator) -> Tensor:
    """int64 [T, K], no expert twice for a token. balanced: loads differ by one at most. zipf: drawn with probability 1/1, 1/2, 1/3, ...
    run: drawn as often as in a trained student.

    (A token's K experts are drawn without replacement, by the Gumbel trick, which evens out the load of K > 1 a little.)
    """
    num_tokens, num_experts, top_k = options.tokens, options.experts, options.top_k
    if routing == "balanced":
        # K consecutive numbers modulo E differ, and T*K consecutive ones fill all experts alike.
        ids_TK = torch.arange(num_tokens * top_k).view(num_tokens, top_k) % num_experts
        return ids_TK[torch.randperm(num_tokens, generator=generator)]
    shares_E = trained_load(options) if routing == "run" else 1 / torch.arange(1, num_experts + 1, dtype=torch.float64)
    uniform_TE = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    gumbel_TE = -(-uniform_TE.log()).log()
    return (gumbel_TE + shares_E.log()).topk(top_k, dim=1).indices


def trained_load(options: ExpertBench) -> Tensor:
    """Rows of each expert [E], fp64, of the most uneven block of the final student of the run in --load-from; none below one row.

    Raises ValueError when the run was not evaluated, or its student has another number of experts.
    """
    assert options.load_from is not None  # `check` saw to it
    file = options.load_from / "evaluate" / "results.json"
    if not file.is_file():
        raise ValueError(f"--load-from {options.load_from}: there is no {file}; give the folder of a run that was evaluated")
    blocks = json.loads(file.read_text()).get("expert_load", {}).get("student", {})
    loads = [torch.tensor(load, dtype=torch.float64) for load in blocks.values()]
    if not loads or any(load.numel() != options.experts for load in loads):
        found = sorted({load.numel() for load in loads}) or "no"
        raise ValueError(
            f"--load-from {options.load_from}: its student has {found} experts and --experts is {options.experts}; make them equal"
        )
    return max(loads, key=lambda load: float(load.max() / load.mean())).clamp_min(1)


def steered_tokens(ids_TK: Tensor, directions_ED: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [T, D] fp32 whose logits with the gate `directions_ED` (orthonormal) are largest at ids[:, 0], then ids[:, 1], ..."""
    num_tokens, top_k = ids_TK.shape
    num_experts, dim = directions_ED.shape
    noise_TD = torch.randn(num_tokens, dim, generator=generator)
    noise_TD = noise_TD - (noise_TD @ directions_ED.T) @ directions_ED
    logits_TE = torch.rand(num_tokens, num_experts, generator=generator) * (GAP / 3)
    wanted_K = GAP * torch.arange(top_k, 0, -1, dtype=torch.float32)
    logits_TE.scatter_add_(1, ids_TK, wanted_K.expand(num_tokens, top_k).contiguous())
    return noise_TD + logits_TE @ directions_ED


def _directions(options: ExpertBench) -> Tensor:
    """Orthonormal rows [E, D]."""
    square = torch.randn(options.dim, options.experts, generator=_generator(options.seed, "directions"))
    return torch.linalg.qr(square).Q.T.contiguous()


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every drawn thing, so that none depends on the order of drawing."""
    number = sum(ord(letter) * 131**i for i, letter in enumerate(name))
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 62))

"""Cases of the level `layer` on several ranks: the experts spread over all of them, by us and by DeepSpeed.

Every rank brings its own tokens; beside these rows, the other rows of the level are data-parallel: each rank holds all experts. Gradients
of spread experts are sums over the tokens of all ranks, so output, input's and router's gradient alone are held against fp64.
"""

from __future__ import annotations

import copy

from torch import nn

from m2mkd_ds.bench.cases import Absent, Case, Ran, grad_of
from m2mkd_ds.bench.exchange import why_not
from m2mkd_ds.bench.workload import Workload
from m2mkd_ds.distributed.expert_parallel import shard_experts_
from m2mkd_ds.distributed.world import World, gather_object


def spread_case(work: Workload, world: World) -> Case | Absent:
    """Our layer with `ep_size` = all ranks, as training spreads it, with the backend that `auto` picks."""
    peer = "expert_parallel"
    reason = why_not(work, world)
    if reason:
        return Absent(peer, reason)
    layer = copy.deepcopy(work.layer)
    layer.experts.backend = "auto"
    shard_experts_(layer, world, world.size)
    leaf_TD = work.x_TD.detach().clone().requires_grad_()

    def forward() -> Ran:
        y_BLD, routing = layer(leaf_TD[None])
        return Ran(y_BLD[0], routing.stats.load_E)

    return Case(
        peer,
        forward,
        lambda y: y.backward(work.grad_TD),
        [leaf_TD, *layer.parameters()],
        kept_rows=sum(work.load),
        computed_rows=sum(work.load),
        gradients=lambda: {"x": grad_of(leaf_TD), "router.weight": grad_of(layer.router.weight)},
        note=f"our layer, experts spread over {world.size} ranks: uneven all-to-all, no padding",
    )


def deepspeed_spread_case(work: Workload, world: World) -> Case | Absent:
    """DeepSpeed's layer with `ep_size` = all ranks and drop_tokens=False, to do the same work."""
    from m2mkd_ds.distributed.external.deepspeed_moe import DeepSpeedMoE

    peer = "deepspeed_expert_parallel"
    reason = why_not(work, world) or ("its experts stand here with gelu only" if work.options.activation != "gelu" else "")
    if reason:
        return Absent(peer, reason)
    layer: nn.Module = DeepSpeedMoE(work.shape, ep_size=world.size).to(work.x_TD.device, work.x_TD.dtype)
    assert isinstance(layer, DeepSpeedMoE)
    layer.load_canonical(work.layer.state_dict())
    leaf_TD = work.x_TD.detach().clone().requires_grad_()

    def forward() -> Ran:
        y_BLD, _, load_E = layer(leaf_TD[None])
        return Ran(y_BLD[0], load_E)

    return Case(
        peer,
        forward,
        lambda y: y.backward(work.grad_TD),
        [leaf_TD, *layer.parameters()],
        kept_rows=sum(work.load),
        # The busiest expert of any rank decides on everybody's padding.
        computed_rows=max(gather_object(max(work.load))) * work.options.experts,
        gradients=lambda: {"x": grad_of(leaf_TD)},
        note=f"stock DeepSpeed MoE with drop_tokens=False, experts spread over {world.size} ranks: even all-to-all of padded buffers",
    )

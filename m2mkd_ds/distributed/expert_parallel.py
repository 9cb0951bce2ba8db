"""Expert parallelism: every rank holds a share of the experts, and rows travel to the rank that holds theirs and back.

    permute -> all-to-all (uneven) -> sort by local expert -> backend -> unsort -> all-to-all back -> combine

`shard_experts_` swaps every `moe.experts.Experts` of a model for a `ParallelExperts`; names of weights stay, the first dimension
shrinks from E to E / ep_size. Only rows that an expert keeps are sent, in any number: no padding, no capacity, and a rank may have
no token at all. Inside an expert, rows are in the order of source rank, then token, which is the order that one process would have
on the concatenated batch. Shape letters: T tokens, K choices, R rows of this rank, S rows that arrive here, E experts, P ranks
that share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from m2mkd_ds.distributed.groups import ExpertGroups, expert_groups
from m2mkd_ds.distributed.world import World
from m2mkd_ds.moe.dispatch import DispatchPlan, combine, permute
from m2mkd_ds.moe.experts import Experts


@dataclass(frozen=True)
class Exchange:
    """Who sends how many rows to whom in one layer and forward pass, and in which order arrived rows are computed."""

    send_rows: list[int]
    """Rows for each rank of the group; they lie one after the other, because rows are sorted by expert and shares are contiguous."""
    receive_rows: list[int]
    order_S: Tensor
    """int64: computed row -> arrived row. Rows arrive by source rank, and are computed by local expert."""
    arrived_S: Tensor
    """int64: arrived row -> computed row; the inverse."""
    offsets_E: Tensor
    """int32 [E / P]: end of each local expert's rows."""


def plan_exchange(offsets_E: Tensor, groups: ExpertGroups) -> Exchange:
    """Tell the other ranks how many rows each of their experts gets from here. Collective; one host sync (the split sizes)."""
    counts_E = offsets_E.long().diff(prepend=offsets_E.new_zeros(1).long())
    received_E = torch.empty_like(counts_E)
    torch.distributed.all_to_all_single(received_E, counts_E, group=groups.expert_group)
    sent_PE, received_PE = counts_E.view(groups.size, -1), received_E.view(groups.size, -1)
    send_rows, receive_rows = torch.stack([sent_PE.sum(dim=1), received_PE.sum(dim=1)]).tolist()  # host sync
    local_E = torch.arange(received_PE.shape[1], device=offsets_E.device).expand_as(received_PE)
    expert_S = local_E.reshape(-1).repeat_interleave(received_E, output_size=sum(receive_rows))
    order_S = expert_S.sort(stable=True).indices
    arrived_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
    return Exchange(send_rows, receive_rows, order_S, arrived_S, received_PE.sum(dim=0).cumsum(0).to(torch.int32))


class ParallelExperts(Experts):
    """This rank's share of a layer's experts; takes the place of `Experts`, with the same `forward`.

    Its gradients come out as those of one process on the tokens of all ranks of the group: the all-to-all back sums them. They
    are then averaged over the ranks that hold the same experts (DeepSpeed knows the parameters by their marks).
    """

    def __init__(self, experts: Experts, groups: ExpertGroups, device: torch.device) -> None:
        """Collective: rank 0's weights are cut, whatever the other ranks hold."""
        nn.Module.__init__(self)
        self.backend = experts.backend
        self.activation = experts.activation
        self.groups = groups
        self.num_experts = experts.down_proj.shape[0]
        share = groups.share(self.num_experts)
        for name, full in experts.named_parameters():
            # One parameter at a time on the device, so that the whole layer never is.
            whole = full.detach().to(device)
            torch.distributed.broadcast(whole, src=0)
            local = nn.Parameter(whole[share.start : share.stop].clone(), requires_grad=full.requires_grad)
            local.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's mark of an expert's parameter
            local.group_name = groups.name  # type: ignore[attr-defined]
            setattr(self, name, local)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens [T, D] -> weighted sum of each token's experts [T, D]. Collective: every rank of the group calls it, also with T = 0."""
        x_TD, weights, backend = self.prepare(x_TD)
        rows_RD = permute(x_TD, plan)
        exchange = plan_exchange(plan.offsets_E, self.groups)
        sorted_SD = _Reorder.apply(send_rows(rows_RD, exchange, self.groups), exchange.order_S, exchange.arrived_S)
        computed_SD = backend.run(sorted_SD, exchange.offsets_E, weights)
        back_SD = _Reorder.apply(computed_SD, exchange.arrived_S, exchange.order_S)
        return combine(return_rows(back_SD, exchange, rows_RD.shape[0], self.groups), weights_TK, plan)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, share {self.groups.rank} of {self.groups.size}"


def send_rows(rows_RD: Tensor, exchange: Exchange, groups: ExpertGroups) -> Tensor:
    """Every row to the rank that holds its expert: [R, D] sorted by expert -> [S, D] by source rank. Collective, differentiable."""
    return _AllToAll.apply(rows_RD, exchange.send_rows, exchange.receive_rows, sum(exchange.receive_rows), groups)


def return_rows(rows_SD: Tensor, exchange: Exchange, num_rows: int, groups: ExpertGroups) -> Tensor:
    """The way back: [S, D] by source rank -> [R, D] as `send_rows` got them, R = `num_rows`. Collective, differentiable."""
    return _AllToAll.apply(rows_SD, exchange.receive_rows, exchange.send_rows, num_rows, groups)


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank of the group; the gradient travels the same ways back.

    `num_out` may exceed what arrives: rows behind it belong to nobody and are left as they are.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], num_out: int, groups: ExpertGroups) -> Tensor:
        ctx.splits = (send, receive, rows_RD.shape[0], groups)
        return _exchange_rows(rows_RD, send, receive, num_out, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        send, receive, num_in, groups = ctx.splits
        return _exchange_rows(grads[0], receive, send, num_in, groups), None, None, None, None


def _exchange_rows(rows_RD: Tensor, send: list[int], receive: list[int], num_out: int, groups: ExpertGroups) -> Tensor:
    out = rows_RD.new_empty(num_out, rows_RD.shape[1])
    arriving = out[: sum(receive)]
    torch.distributed.all_to_all_single(arriving, rows_RD[: sum(send)].contiguous(), receive, send, group=groups.expert_group)
    return out


class _Reorder(torch.autograd.Function):
    """A permutation of rows by a gather, whose gradient is the gather by the inverse (autograd's own would be an index_add)."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        ctx.inverse_S = inverse_S
        return rows_SD.index_select(0, order_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.inverse_S), None, None


def shard_experts_(module: nn.Module, world: World, ep_size: int) -> ExpertGroups:
    """Collective: cut the experts of every MoE layer of `module` over groups of `ep_size` ranks, in place; rank 0's weights count.

    Call it before the optimizer is made: the parameters are new ones. Raises ConfigError when ep_size does not divide ranks or experts,
    and when the module has no experts.
    """
    groups = expert_groups(world, ep_size)
    layers = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children() if isinstance(child, Experts)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no experts to spread over {ep_size} ranks; set ep_size to 1")
    for parent, name, experts in layers:
        num_experts = experts.down_proj.shape[0]
        if isinstance(experts, ParallelExperts) or num_experts % ep_size:
            raise ValueError(f"{name}: {num_experts} experts cannot be spread over ep_size {ep_size} ranks (or they are spread already)")
        setattr(parent, name, ParallelExperts(experts, groups, world.device))
    return groups


def has_experts(module: nn.Module) -> bool:
    """Whether some layer of the module has experts, spread or not."""
    return any(isinstance(child, Experts) for child in module.modules())


def parallel_layers(module: nn.Module) -> dict[str, ParallelExperts]:
    """The spread layers of a module by name; empty without expert parallelism."""
    return {name: child for name, child in module.named_modules() if isinstance(child, ParallelExperts)}


def expert_parameters(module: nn.Module) -> set[str]:
    """Names of the weights of all experts, spread or not."""
    layers = ((name, child) for name, child in module.named_modules() if isinstance(child, Experts))
    return {f"{name}.{leaf}" if name else leaf for name, child in layers for leaf, _ in child.named_parameters()}


def gather_experts(local: Tensor, groups: ExpertGroups) -> Tensor:
    """Collective: this rank's share [E / P, ...] of a stacked weight -> the whole [E, ...] on every rank."""
    parts = [torch.empty_like(local) for _ in range(groups.size)]
    torch.distributed.all_gather(parts, local.contiguous(), group=groups.expert_group)
    return torch.cat(parts)

"""What an engine notes of its parameters before DeepSpeed takes them: their optimizer groups, and what they are on any cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from m2mkd_ds.checkpoint.state.rank_files import Parameter
from m2mkd_ds.distributed.expert_parallel import ParallelExperts, expert_parameters, parallel_layers
from m2mkd_ds.distributed.groups import ExpertGroups


def named_groups_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, ...]]:
    """Parameter names of the optimizer's groups, after checking that they are all the trainable ones, once each."""
    names = {id(p): name for name, p in module.named_parameters()}
    wrong = [f"{name} is {p.dtype}" for name, p in module.named_parameters() if p.dtype != torch.float32]
    if wrong:
        raise ValueError(f"the engine needs fp32 parameters (it casts them itself): {', '.join(wrong[:5])}")
    groups = [tuple(names.get(id(p), f"<not of the module: {tuple(p.shape)}>") for p in g["params"]) for g in optimizer.param_groups]
    given = Counter(name for group in groups for name in group)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    missing, foreign = sorted(trainable - set(given)), sorted(set(given) - trainable)
    twice = sorted(name for name, count in given.items() if count > 1)
    if missing or foreign or twice or not all(groups):
        raise ValueError(
            f"the optimizer must hold every trainable parameter once and no empty group: missing {missing[:5]}, "
            f"frozen or foreign {foreign[:5]}, more than once {twice[:5]}"
        )
    return groups


def describe_parameters(
    module: nn.Module,
    named_groups: Sequence[tuple[str, ...]],
    optimizer: torch.optim.Optimizer,
    experts: Sequence[ExpertGroups | None],
) -> tuple[Parameter, ...]:
    """The trainable parameters as a checkpoint describes them: what they are on a cluster of any shape.

    Spread experts have optimizer groups of their own, which become one with the others' when experts are not spread: a *family* is told by
    its weight decay, and among groups of the same decay by their order.
    """
    families: dict[tuple[Any, int], int] = {}
    family_of: dict[str, int] = {}
    ep_size_of: dict[str, int] = {}
    seen: Counter[tuple[bool, Any]] = Counter()
    for names, group, spread in zip(named_groups, optimizer.param_groups, experts, strict=True):
        decay = group.get("weight_decay")
        family = families.setdefault((decay, seen[spread is not None, decay]), len(families))
        seen[spread is not None, decay] += 1
        family_of |= dict.fromkeys(names, family)
        ep_size_of |= dict.fromkeys(names, 1 if spread is None else spread.size)
    of_experts = expert_parameters(module)
    found = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            shape = (p.shape[0] * ep_size_of[name], *p.shape[1:]) if ep_size_of[name] > 1 else tuple(p.shape)
            found.append(Parameter(name, shape, family_of[name], name in of_experts))
        elif name in of_experts and any(layer.groups.size > 1 for layer in parallel_layers(module).values()):
            raise ValueError(f"{name} is frozen and spread over ranks, which no rank could save; set ep_size to 1")
    return tuple(found)


def expert_groups_of_optimizer(group: Mapping[str, Any]) -> ExpertGroups | None:
    """Who shares the experts of an optimizer group; None for a group of parameters that every rank has."""
    return group["experts"] if group.get("moe") else None


def check_stage_3(module: nn.Module, spread: Mapping[str, ParallelExperts]) -> None:
    """Refuse what ZeRO-3 cannot do here. Raises ValueError."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    if frozen or spread:
        what = f"frozen parameters ({', '.join(frozen[:3])})" if frozen else "spread experts (ep_size > 1)"
        raise ValueError(f"zero_optimization.stage 3 does not work with {what} here; use stage 1 or 2")

"""Where DeepSpeed keeps this rank's fp32 masters, by ZeRO stage, and how a changed master gets into what the forward pass reads.

The engine reads, saves, averages and restores masters through these two classes and knows no stage itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.state.layout import FlatGroup, PartedGroup
from m2mkd_ds.distributed.groups import ExpertGroups
from m2mkd_ds.distributed.layout import gather
from m2mkd_ds.distributed.world import World


class ZeroShards(Protocol):
    """This rank's masters, one a layout. The optimizer's state is kept under the masters themselves."""

    layouts: list[FlatGroup]

    def masters(self) -> list[Tensor]:
        """fp32 parts, in the order of `layouts`; the live tensors that the optimizer steps."""
        ...

    def publish(self) -> None:
        """Collective: round the masters to the precision of the run and put them into the module."""
        ...


class PartitionedOptimizer:
    """ZeRO-1 and ZeRO-2: the module is whole on every rank, the optimizer's groups hold one flat part each."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        named_groups: Sequence[tuple[str, ...]],
        world: World,
        experts: Sequence[ExpertGroups | None],
    ) -> None:
        self._parameters = dict(module.named_parameters())
        self._optimizer = optimizer
        self.layouts: list[FlatGroup] = []
        for names, group, spread in zip(named_groups, optimizer.param_groups, experts, strict=True):
            shapes = tuple(self._parameters[name].shape for name in names)
            place = (world.rank, world.size) if spread is None else (spread.data_rank, spread.data_size, spread.rank, spread.size)
            self.layouts.append(FlatGroup(names, shapes, group["params"][0].numel(), *place))

    def masters(self) -> list[Tensor]:
        """ZeRO leaves exactly one flat parameter in each group of the optimizer."""
        return [group["params"][0] for group in self._optimizer.param_groups]

    def publish(self) -> None:
        """Gather every row and copy it into the parameters."""
        for layout, master_P in zip(self.layouts, self.masters(), strict=True):
            for name, value in layout.split(gather(layout, master_P)).items():
                self._parameters[name].data.copy_(value)


class PartitionedModule:
    """ZeRO-3: every parameter is cut over the ranks and put together for the moment of its use."""

    def __init__(self, module: nn.Module, zero: Any, shapes: Mapping[str, torch.Size], world: World) -> None:
        """`zero` is DeepSpeed's stage-3 optimizer, `shapes` the parameters' shapes before it cut them."""
        self._zero = zero
        name_of = {id(p): name for name, p in module.named_parameters()}
        self.layouts: list[FlatGroup] = []
        for params, master_P in zip(zero.fp16_groups, self.masters(), strict=True):
            names = tuple(name_of[id(p)] for p in params)
            layout = PartedGroup(names, tuple(shapes[name] for name in names), master_P.numel(), world.rank, world.size)
            if sum(layout.piece_numels) != layout.part_numel:
                raise RuntimeError("this DeepSpeed pads ZeRO-3's pieces in an unknown way; use a tested release: deepspeed>=0.19.8,<0.20")
            self.layouts.append(layout)

    def masters(self) -> list[Tensor]:
        """One flat part a sub-group."""
        return list(self._zero.fp32_partitioned_groups_flat)

    def publish(self) -> None:
        """Copy the masters into the partitions; small parameters, which DeepSpeed keeps whole, are gathered anew."""
        zero = self._zero
        zero._partition_all_parameters()
        for index, master_P in enumerate(self.masters()):
            zero.fp16_partitioned_groups_flat[index].data.copy_(master_P.data)
            zero._unflatten_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def forget_module(root: nn.Module) -> None:
    """Take a closed ZeRO-3 engine's module out of the two global places in which DeepSpeed 0.19 keeps it, and all of its memory, for
    ever: a stack of modules, and the cache of a method, whose keys are the engine's own objects."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not root]
    method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(method, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()

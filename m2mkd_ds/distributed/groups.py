"""Which ranks share the experts of a layer (expert parallelism), and which hold the same ones (expert-data parallelism).

    world of 4, ep_size 2:   ranks 0 1 | 2 3   share the experts of every layer: 0 and 2 hold the first half, 1 and 3 the second
                             ranks 0 2 | 1 3   hold the same experts and average their gradients

Neighbouring ranks share experts, because launchers number ranks host by host: the all-to-all stays inside a host where ep_size
divides the ranks of a host. DeepSpeed makes the process groups and keeps them by name, so that ZeRO reduces over the same ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed

from m2mkd_ds.config import ConfigError
from m2mkd_ds.distributed.world import World

logger = logging.getLogger("m2mkd_ds")


@dataclass(frozen=True)
class ExpertGroups:
    """This rank's place among the ranks that share experts, and among those that hold the same ones. Plain numbers: it can be
    copied and pickled, the process groups are looked up when they are needed."""

    size: int
    """ep_size: over how many ranks the experts of a layer are spread."""
    rank: int
    """Which share this rank holds, 0..size-1."""
    data_size: int
    """How many ranks hold the same experts."""
    data_rank: int

    @property
    def name(self) -> str:
        """What DeepSpeed calls the groups, and expects as the name of the optimizer's expert groups."""
        return f"ep_size_{self.size}"

    @property
    def expert_group(self) -> Any:
        """Process group of the ranks that share the experts."""
        from deepspeed.utils import groups

        return groups._get_expert_parallel_group(self.name)

    @property
    def data_group(self) -> Any:
        """Process group of the ranks that hold the same experts."""
        from deepspeed.utils import groups

        return groups._get_expert_data_parallel_group(self.name)

    def share(self, num_experts: int) -> range:
        """Numbers of the experts of this rank."""
        local = num_experts // self.size
        return range(self.rank * local, (self.rank + 1) * local)


def expert_groups(world: World, ep_size: int) -> ExpertGroups:
    """Collective: make the groups of `ep_size` (once a job) and return this rank's place. Raises ConfigError if it does not divide."""
    check_divides("ep_size", ep_size, world.size)
    from deepspeed.utils import groups

    place = ExpertGroups(ep_size, world.rank % ep_size, world.size // ep_size, world.rank // ep_size)
    if place.name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
        if world.local_size % ep_size:
            logger.warning(
                "ep_size %d does not divide the %d ranks of a host: the all-to-all of the experts crosses hosts", ep_size, world.local_size
            )
    # The numbering above is DeepSpeed's, too; a release with another one must not train wrong weights.
    assert torch.distributed.get_rank(place.expert_group) == place.rank and torch.distributed.get_rank(place.data_group) == place.data_rank
    return place


def check_divides(where: str, ep_size: int, world_size: int) -> None:
    """Refuse an ep_size that does not divide the ranks."""
    if ep_size < 1 or world_size % ep_size:
        allowed = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        alone = f"; start more ranks, for example with deepspeed --num_gpus {ep_size}" if world_size == 1 and ep_size > 1 else ""
        raise ConfigError(f"{where} is {ep_size} and the job has {world_size} ranks; allowed are the divisors {allowed}{alone}")


def check_expert_parallel(where: str, ep_size: int, *, num_experts: int | None, world_size: int | None, zero: Mapping[str, Any]) -> None:
    """Refuse, by name and before any model is built, what expert parallelism cannot do. `num_experts` is None for a dense model,
    `world_size` where the number of ranks is not known yet, `zero` is the block zero_optimization.

    Raises ConfigError: an ep_size that divides not the ranks or not the experts; one above 1 without experts, with ZeRO-3, or with
    overlap_comm.
    """
    if ep_size == 1:
        return
    if num_experts is None:
        raise ConfigError(f"{where}.ep_size is {ep_size}, but the model of this phase has no experts; set it to 1")
    if num_experts % ep_size:
        allowed = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise ConfigError(
            f"{where}.ep_size is {ep_size} and student.moe.num_experts is {num_experts}; allowed are the divisors {allowed} "
            "(that also divide the number of ranks)"
        )
    if zero.get("overlap_comm"):
        raise ConfigError(
            f"{where}.ep_size is {ep_size} and its ds_config has zero_optimization.overlap_comm true: reductions and all-to-alls would run "
            "side by side on two communicators, which NCCL may answer with a deadlock, and no GPU has tried; set overlap_comm to false"
        )
    if zero["stage"] == 3:
        raise ConfigError(
            f"{where}.ep_size is {ep_size} and its ds_config has zero_optimization.stage 3: DeepSpeed supports expert parallelism up to "
            "stage 2; use ds_config=zero2, or ep_size=1 (ZeRO-3 spreads the experts over all ranks by itself)"
        )
    if world_size is not None:
        check_divides(f"{where}.ep_size", ep_size, world_size)

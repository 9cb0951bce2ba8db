"""The layouts of `checkpoint/state/layout.py` (pure arithmetic) on a running job: what needs collectives.

The engine compares a layout with what DeepSpeed really holds before the first step, so that a release that lays things out otherwise
is noticed. Shape letters: F elements of all parts, P elements of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from m2mkd_ds.checkpoint.state.layout import FlatGroup
from m2mkd_ds.distributed.groups import ExpertGroups


def expert_groups_of(layout: FlatGroup) -> ExpertGroups | None:
    """Who shares and who repeats a group of spread experts; None for a group whose parts are spread over all ranks."""
    return ExpertGroups(layout.ep_size, layout.ep_rank, layout.data_size, layout.data_rank) if layout.ep_size > 1 else None


def process_group(layout: FlatGroup) -> Any:
    """The ranks over which the parts are spread; None is torch's name for all."""
    experts = expert_groups_of(layout)
    return None if experts is None else experts.data_group


def gather(layout: FlatGroup, part_P: Tensor) -> Tensor:
    """Collective: every rank's part -> full_F on every rank."""
    full_F = torch.empty(layout.part_numel * layout.data_size, dtype=part_P.dtype, device=part_P.device)
    torch.distributed.all_gather_into_tensor(full_F, part_P.detach().contiguous(), group=process_group(layout))
    return full_F


def fill_master(layout: FlatGroup, master_P: Tensor, originals: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Collective: give the fp32 masters the bits that DeepSpeed's cast took away, after checking that the layout is as assumed."""
    # DeepSpeed did the same with the cast parameters. One parameter at a time is on the device, never the whole row.
    first = {}
    for name in layout.names:
        tensor = originals[name].to(master_P.device, copy=True)
        # The rank that holds part 0 of this share has the share's number.
        torch.distributed.broadcast(tensor, src=layout.ep_rank, group=process_group(layout))
        first[name] = tensor.to(originals[name].device)
    local_P = layout.local(layout.join(first)).to(master_P.device)
    # Padding is DeepSpeed's own affair: what it holds there is compared with itself.
    is_weight_P = layout.local(layout.join({name: torch.ones(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}))
    held_P = torch.where(is_weight_P.to(master_P.device).bool(), master_P.detach(), local_P)
    if not torch.equal(held_P.to(dtype), local_P.to(dtype)):
        raise RuntimeError("this DeepSpeed lays out ZeRO's flat buffers in an unknown way; use a tested release: deepspeed>=0.19.8,<0.20")
    with torch.no_grad():
        master_P.copy_(local_P)

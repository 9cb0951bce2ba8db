"""How ZeRO keeps fp32 weights and optimizer state: which elements of which parameter lie on which rank.

ZeRO-1 and ZeRO-2 lay the parameters of an optimizer group end to end, pad the row to equal parts, and give each rank one part
(`FlatGroup`). ZeRO-3 cuts every parameter by itself, pads each, and lays a rank's pieces end to end (`PartedGroup`):

    FlatGroup    rank 0  [ w0 | w1 | w2..   ]        PartedGroup    rank 0  [ w0 first half  | w1 first half  | ...
                 rank 1  [    ..w2 |   pad  ]                       rank 1  [ w0 second half | w1 second half | ...

"The ranks" are all ranks of the job, or, for the experts of expert parallelism, those that hold the same ones. `full_F` is the parts
of all of them, one after the other. The engine compares the layout with what DeepSpeed really holds before the first step, so that a
release that lays things out otherwise is noticed. Shape letters: F elements of all parts, P elements of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from m2mkd_ds.distributed.groups import ExpertGroups


@dataclass(frozen=True)
class FlatGroup:
    """The layout of one optimizer group under ZeRO-1 and ZeRO-2."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    part_numel: int
    """P, elements of one rank's part."""
    rank: int
    """Which part this rank holds, 0..size-1."""
    size: int
    experts: ExpertGroups | None = None
    """For a group of spread experts: who shares and who repeats them. None: the parts are spread over all ranks."""

    def __post_init__(self) -> None:
        if self.part_numel * self.size < self.numel:
            raise RuntimeError(f"{self.size} parts of {self.part_numel} elements cannot hold the {self.numel} of {self.names[0]}, ...")

    @property
    def numel(self) -> int:
        """Elements of the parameters, without padding."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def process_group(self) -> Any:
        """The ranks over which the parts are spread; None is torch's name for all."""
        return None if self.experts is None else self.experts.data_group

    @property
    def first_rank(self) -> int:
        """The job's number of the rank that holds part 0."""
        return 0 if self.experts is None else self.experts.rank

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> full_F (fp32, on the device of the tensors)."""
        row = torch.cat([tensors[name].detach().float().flatten() for name in self.names])
        return torch.nn.functional.pad(row, (0, self.part_numel * self.size - row.numel()))

    def split(self, full_F: Tensor) -> dict[str, Tensor]:
        """full_F -> named tensors (views of it)."""
        pieces = full_F[: self.numel].split([shape.numel() for shape in self.shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def local(self, full_F: Tensor) -> Tensor:
        """This rank's part of full_F."""
        return full_F.narrow(0, self.rank * self.part_numel, self.part_numel)

    def gather(self, part_P: Tensor) -> Tensor:
        """Collective: every rank's part -> full_F on every rank."""
        full_F = torch.empty(self.part_numel * self.size, dtype=part_P.dtype, device=part_P.device)
        torch.distributed.all_gather_into_tensor(full_F, part_P.detach().contiguous(), group=self.process_group)
        return full_F


@dataclass(frozen=True)
class PartedGroup(FlatGroup):
    """The layout of one sub-group under ZeRO-3."""

    @property
    def piece_numels(self) -> list[int]:
        """Elements of each parameter's piece on one rank, padding included."""
        return [-(-shape.numel() // self.size) for shape in self.shapes]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> full_F (fp32, on the device of the tensors)."""
        pieces = []
        for name, piece in zip(self.names, self.piece_numels, strict=True):
            flat = tensors[name].detach().float().flatten()
            pieces.append(torch.nn.functional.pad(flat, (0, piece * self.size - flat.numel())).view(self.size, piece))
        return torch.cat(pieces, dim=1).flatten()

    def split(self, full_F: Tensor) -> dict[str, Tensor]:
        """full_F -> named tensors (copies)."""
        columns = full_F.view(self.size, self.part_numel).split(self.piece_numels, dim=1)
        return {
            name: column.flatten()[: shape.numel()].view(shape)
            for name, column, shape in zip(self.names, columns, self.shapes, strict=True)
        }


LAYOUTS: dict[str, type[FlatGroup]] = {"flat": FlatGroup, "parted": PartedGroup}
"""Layouts by the name that checkpoints call them."""


def layout_kind(layout: FlatGroup) -> str:
    """The name of a layout in LAYOUTS."""
    return next(kind for kind, cls in LAYOUTS.items() if type(layout) is cls)


def fill_master(layout: FlatGroup, master_P: Tensor, originals: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Collective: give the fp32 masters the bits that DeepSpeed's cast took away, after checking that the layout is as assumed."""
    # DeepSpeed did the same with the cast parameters. One parameter at a time is on the device, never the whole row.
    first = {}
    for name in layout.names:
        tensor = originals[name].to(master_P.device, copy=True)
        torch.distributed.broadcast(tensor, src=layout.first_rank, group=layout.process_group)
        first[name] = tensor.to(originals[name].device)
    local_P = layout.local(layout.join(first)).to(master_P.device)
    # Padding is DeepSpeed's own affair: what it holds there is compared with itself.
    is_weight_P = layout.local(layout.join({name: torch.ones(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}))
    held_P = torch.where(is_weight_P.to(master_P.device).bool(), master_P.detach(), local_P)
    if not torch.equal(held_P.to(dtype), local_P.to(dtype)):
        raise RuntimeError("this DeepSpeed lays out ZeRO's flat buffers in an unknown way; use a tested release: deepspeed>=0.19.8,<0.20")
    with torch.no_grad():
        master_P.copy_(local_P)

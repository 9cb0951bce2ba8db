"""How ZeRO-1 and ZeRO-2 keep fp32 weights and optimizer state, and how to read and write them by parameter name.

ZeRO lays the parameters of an optimizer group end to end, pads the row to equal parts, and gives each rank one part:

    group      [ w0 | w1 |    w2    | pad ]          full_F, F = ranks * P
    rank 0     [ w0 | w1 | ]                         part_P: fp32 master weights, exp_avg, exp_avg_sq
    rank 1                 [   w2   | pad ]          part_P

`FlatGroup` knows that layout: it turns named tensors into a row and back, and a row into this rank's part. The engine
compares it with what DeepSpeed really holds before the first step, so a release that lays rows out otherwise is noticed.
Shape letters: F elements of the padded row, P elements of a part.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

FORMAT = 1
"""Version of the rank files that `write_rank_file` makes."""


@dataclass(frozen=True)
class FlatGroup:
    """The layout of one optimizer group."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    part_numel: int
    """P, elements of one rank's part."""
    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.part_numel * self.size < self.numel:
            raise RuntimeError(f"{self.size} parts of {self.part_numel} elements cannot hold the {self.numel} of {self.names[0]}, ...")

    @property
    def numel(self) -> int:
        """Elements of the row without its padding."""
        return sum(shape.numel() for shape in self.shapes)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> full_F (fp32, on the device of the tensors)."""
        row = torch.cat([tensors[name].detach().float().flatten() for name in self.names])
        return torch.nn.functional.pad(row, (0, self.part_numel * self.size - row.numel()))

    def split(self, full_F: Tensor) -> dict[str, Tensor]:
        """full_F (its padding may be missing) -> named views of it."""
        pieces = full_F[: self.numel].split([shape.numel() for shape in self.shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def local(self, full_F: Tensor) -> Tensor:
        """This rank's part of a row."""
        return full_F.narrow(0, self.rank * self.part_numel, self.part_numel)

    def gather(self, part_P: Tensor) -> Tensor:
        """Collective: every rank's part -> full_F on every rank."""
        full_F = torch.empty(self.part_numel * self.size, dtype=part_P.dtype, device=part_P.device)
        torch.distributed.all_gather_into_tensor(full_F, part_P.detach().contiguous())
        return full_F


def fill_master(layout: FlatGroup, master_P: Tensor, originals: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Collective: give the fp32 masters the bits that DeepSpeed's cast took away, after checking that the layout is as assumed."""
    full_F = layout.join(originals)
    torch.distributed.broadcast(full_F, src=0)  # DeepSpeed did the same with the cast parameters
    local_P = layout.local(full_F).to(master_P.device)
    if not torch.equal(master_P.detach().to(dtype), local_P.to(dtype)):
        raise RuntimeError("this DeepSpeed lays out ZeRO's flat buffers in an unknown way; use a tested release: deepspeed>=0.19.8,<0.20")
    with torch.no_grad():
        master_P.copy_(local_P)


@dataclass
class GroupState:
    """What a rank holds of one group: `tensors_P` by kind (`master`, `exp_avg`, `exp_avg_sq`, `ema`), `scalars` (`step`)."""

    names: tuple[str, ...]
    numel: int
    tensors_P: dict[str, Tensor]
    scalars: dict[str, Tensor] = field(default_factory=dict)


def optimizer_state(state: Mapping[str, Any], master_P: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A torch optimizer's state of the flat parameter -> (tensors laid out like it, scalars)."""
    tensors_P = {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.shape == master_P.shape}
    scalars = {kind: torch.as_tensor(value) for kind, value in state.items() if kind not in tensors_P}
    return tensors_P, scalars


def write_rank_file(path: Path, groups: Sequence[GroupState], *, size: int, extra: Mapping[str, Any]) -> None:
    """Write one rank's share and force it to disk. Plain tensors, numbers and strings only: `weights_only` can read it."""
    record = {
        "format": FORMAT,
        "size": size,
        "groups": [
            {
                "names": list(g.names),
                "numel": g.numel,
                # Clones: a view would drag the whole buffer behind it into the file.
                "tensors": {kind: part_P.detach().cpu().clone() for kind, part_P in g.tensors_P.items()},
                "scalars": {kind: value.detach().cpu().clone() for kind, value in g.scalars.items()},
            }
            for g in groups
        ],
        "extra": dict(extra),
    }
    with path.open("wb") as file:
        torch.save(record, file)
        file.flush()
        os.fsync(file.fileno())


def rank_file(folder: Path, rank: int) -> Path:
    """Where rank `rank` of the writing job put its share."""
    return folder / f"engine_rank_{rank:05d}.pt"


def read_rank_files(folder: Path, groups: Sequence[FlatGroup]) -> tuple[list[GroupState], dict[str, Any]]:
    """This rank's share of a saved engine, whatever number of ranks wrote it; and what rank 0 wrote as `extra`.

    With the same number of ranks, only rank 0's file and the own one are opened. Raises ValueError when files are missing or
    their groups hold other parameters than `groups`.
    """
    rank, size = groups[0].rank, groups[0].size
    first = _read(rank_file(folder, 0))
    if first["size"] == size:
        records = [first if rank == 0 else _read(rank_file(folder, rank))]
    else:
        records = [first, *(_read(rank_file(folder, r)) for r in range(1, first["size"]))]
    saved = [tuple(group["names"]) for group in first["groups"]]
    if saved != [g.names for g in groups]:
        raise ValueError(f"{folder}: {_difference(saved, [g.names for g in groups])}")
    states = []
    for index, layout in enumerate(groups):
        shares = [record["groups"][index] for record in records]
        parts = {kind: [share["tensors"][kind] for share in shares] for kind in shares[0]["tensors"]}
        tensors_P = {kind: _reslice(list_P, layout, first["size"]) for kind, list_P in parts.items()}
        states.append(GroupState(layout.names, layout.numel, tensors_P, shares[0]["scalars"]))
    return states, first["extra"]


def _reslice(parts: list[Tensor], layout: FlatGroup, saved_size: int) -> Tensor:
    """The parts of all writing ranks (or the own one, when the job has as many ranks) -> this rank's part."""
    if saved_size == layout.size:
        return parts[0]
    row = torch.cat(parts)[: layout.numel]  # without the padding, which depends on the number of ranks
    return layout.local(torch.nn.functional.pad(row, (0, layout.part_numel * layout.size - layout.numel)))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: this file of the checkpoint is missing; take an earlier checkpoint")
    record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not an engine file of format {FORMAT}; it was written by another version of this package")
    return record


def _difference(saved: list[tuple[str, ...]], wanted: list[tuple[str, ...]]) -> str:
    """Say how the parameters of a checkpoint differ from the module's."""
    in_file, in_module = ({name for names in groups for name in names} for groups in (saved, wanted))
    if in_file != in_module:
        return (
            f"only in the checkpoint: {sorted(in_file - in_module)[:5]}, only in the module: {sorted(in_module - in_file)[:5]}; "
            "the checkpoint belongs to another model"
        )
    return "the checkpoint has the same parameters in other optimizer groups or another order; it belongs to another version of the model"

"""The rank files of a checkpoint: every rank's fp32 masters, optimizer state and average, as plain tensors with parameter names.

A job with another number of ranks, or with another ZeRO stage, can read them: parts are joined to named tensors and cut anew
(`layout.py`). Only the number of ranks that share a layer's experts (ep_size) has to stay. Shape letters: P elements of a part.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.distributed.layout import LAYOUTS, FlatGroup, layout_kind

FORMAT = 2
"""Version of the rank files that `write_rank_file` makes."""


@dataclass
class GroupState:
    """What a rank holds of one group: `tensors_P` by kind (`master`, `exp_avg`, `exp_avg_sq`, `ema`), `scalars` (`step`)."""

    layout: FlatGroup
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
                "names": list(g.layout.names),
                "shapes": [list(shape) for shape in g.layout.shapes],
                "kind": layout_kind(g.layout),
                "ep_size": g.layout.experts.size if g.layout.experts else 1,
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


def read_rank_files(folder: Path, groups: Sequence[FlatGroup], world_size: int, rank: int) -> tuple[list[GroupState], dict[str, Any]]:
    """This rank's share of a saved engine, whatever number of ranks wrote it; and what rank 0 wrote as `extra`.

    With the same number of ranks and the same layout, only rank 0's file and the own one are opened. Raises ValueError when files are
    missing, their groups hold other parameters than `groups`, or experts were spread over another number of ranks.
    """
    first = _read(rank_file(folder, 0))
    heads = [(group["kind"], group["ep_size"]) for group in first["groups"]]
    wanted = [(layout_kind(layout), layout.experts.size if layout.experts else 1) for layout in groups]
    saved_ep, wanted_ep = (max(ep for _, ep in kinds) for kinds in (heads, wanted))
    if saved_ep != wanted_ep:
        raise ValueError(f"{folder}: written with ep_size {saved_ep}, and this launch has {wanted_ep}; launch with ep_size {saved_ep}")
    names = [tuple(group["names"]) for group in first["groups"]]
    same = first["size"] == world_size and heads == wanted and names == [layout.names for layout in groups]
    if same:
        records = {rank: first if rank == 0 else _read(rank_file(folder, rank))}
    else:
        records = {r: first if r == 0 else _read(rank_file(folder, r)) for r in range(first["size"])}
    _check_names(folder, first["groups"], groups)
    states = [_own_share(layout, records[rank]) if same else _joined_share(layout, records, first["size"]) for layout in groups]
    return states, first["extra"]


def _check_names(folder: Path, saved: Sequence[Mapping[str, Any]], groups: Sequence[FlatGroup]) -> None:
    """The parameters must be the same; their order and grouping may differ only between ZeRO stages."""
    saved_names, wanted_names = [tuple(group["names"]) for group in saved], [layout.names for layout in groups]
    flat = {group["kind"] for group in saved} | {layout_kind(layout) for layout in groups} == {"flat"}
    if saved_names != wanted_names if flat else sorted(sum(saved_names, ())) != sorted(sum(wanted_names, ())):
        raise ValueError(f"{folder}: {_difference(saved_names, wanted_names)}")


def _own_share(layout: FlatGroup, record: Mapping[str, Any]) -> GroupState:
    """This rank's part of one group, as it lies in this rank's own file."""
    share = next(group for group in record["groups"] if tuple(group["names"]) == layout.names)
    return GroupState(layout, share["tensors"], share["scalars"])


def _joined_share(layout: FlatGroup, records: Mapping[int, dict[str, Any]], saved_size: int) -> GroupState:
    """This rank's part of one group, out of the files of all ranks: joined by name and cut anew."""
    ep_rank, ep_size = (layout.experts.rank, layout.experts.size) if layout.experts else (0, 1)
    named: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, Tensor] = {}
    for index, head in enumerate(records[0]["groups"]):
        names, shapes = tuple(head["names"]), tuple(torch.Size(shape) for shape in head["shapes"])
        if not set(names) & set(layout.names):
            continue
        shares = [records[r]["groups"][index] for r in range(ep_rank, saved_size, ep_size)]
        scalars = shares[0]["scalars"]
        for kind in shares[0]["tensors"]:
            parts = [share["tensors"][kind] for share in shares]
            saved = LAYOUTS[head["kind"]](names, shapes, parts[0].numel(), 0, len(parts))
            named.setdefault(kind, {}).update(saved.split(torch.cat(parts)))
    return GroupState(layout, {kind: layout.local(layout.join(tensors)).clone() for kind, tensors in named.items()}, scalars)


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

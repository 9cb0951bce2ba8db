"""An engine's share of a checkpoint in CPU memory: taken in a moment, written at leisure (`checkpoint/state/rank_files.py` is the format).

Shape letters: P elements of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.state.layout import FlatGroup
from m2mkd_ds.checkpoint.state.rank_files import Description, FileRecord, RankFiles, write_rank_file


class RankSnapshot:
    """One rank's tensors as they were, in memory of their own. Knows no engine and no process group: any thread may write it."""

    def __init__(self, description: Description, rank: int, tensors: Mapping[str, Tensor], reuse: RankSnapshot | None) -> None:
        """Copies `tensors` (by their names in the file, on any device); into the memory of `reuse` where that fits, which is then of no
        use any more. Returns when all copies are there."""
        self.description = description
        self.rank = rank
        old = (reuse._tensors or {}) if reuse is not None else {}
        if reuse is not None:
            reuse._tensors = None  # soon half of it would be the new state: better nothing than a mixture
        self._tensors: dict[str, Tensor] | None = {name: _copied(value, old.get(name)) for name, value in tensors.items()}
        for device in {value.device for value in tensors.values() if value.is_cuda}:
            torch.cuda.synchronize(device)  # host sync: the copies were only asked for

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write this rank's file into the existing `folder` and force it to disk. Raises OSError for a full disk."""
        if self._tensors is None:
            raise RuntimeError("this snapshot was given away as `reuse` to a later one: write that one")
        return write_rank_file(folder, self.description, self.rank, self._tensors)


def _copied(value: Tensor, room: Tensor | None) -> Tensor:
    """The tensor's values in CPU memory: in `room`, if it has the right size. From a GPU, without waiting."""
    if room is None or (room.dtype, room.shape) != (value.dtype, value.shape):
        room = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return room.copy_(value.detach(), non_blocking=True)


def optimizer_state(state: Mapping[str, Any], master_P: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A torch optimizer's state of the flat parameter -> (tensors laid out like it, scalars)."""
    tensors_P = {kind: value for kind, value in state.items() if torch.is_tensor(value) and value.shape == master_P.shape}
    scalars = {kind: torch.as_tensor(value) for kind, value in state.items() if kind not in tensors_P}
    return tensors_P, scalars


def check_same_model(files: RankFiles, layouts: Sequence[FlatGroup]) -> None:
    """Raises ValueError when a checkpoint's trained weights are not those of an engine with these layouts, or have other shapes."""
    saved = {name: torch.Size(p.shape) for name, p in files.parameters.items()}
    wanted = {name: shape for layout in layouts for name, shape in layout.canonical_shapes.items()}
    if set(saved) != set(wanted):
        raise ValueError(
            f"{files.folder}: only in the checkpoint: {sorted(set(saved) - set(wanted))[:5]}, only in the module: "
            f"{sorted(set(wanted) - set(saved))[:5]}; the checkpoint belongs to another model"
        )
    wrong = {name: (tuple(saved[name]), tuple(wanted[name])) for name in wanted if saved[name] != wanted[name]}
    if wrong:
        name, (there, here) = next(iter(wrong.items()))
        raise ValueError(f"{files.folder}: {name} is {there} in the checkpoint and {here} in the module; it belongs to another model")


def fill_part(files: RankFiles, kind: str, layout: FlatGroup, part_P: Tensor) -> None:
    """Read this rank's part of one kind into `part_P`; padding stays as it is."""
    for offset, run in files.runs_held(kind, layout):
        part_P[offset : offset + run.numel()] = run.to(part_P.device)

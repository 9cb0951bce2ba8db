"""A checkpoint as if one process had written it: whole tensors by their canonical names, read piece by piece.

Spread experts come joined, [E, ...] by their global numbers, and whatever number of ranks, ep_size and ZeRO stage wrote the files, the
same training state reads the same, bit for bit. One tensor is in memory at a time, or less (`read_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.state.rank_files import Description, RankFiles

SHARED = "shared"
"""The kind of frozen parameters and buffers."""


class CanonicalCheckpoint:
    """A checkpoint folder (`step-00000100`). Its files are taken as they are: `verify_checkpoint` says whether they are undamaged."""

    def __init__(self, folder: str | Path) -> None:
        """Raises StoreError for a folder that holds no checkpoint of this format."""
        self.folder = Path(folder)
        self._files = RankFiles(self.folder)
        self.description: Description = self._files.description
        self.kinds: tuple[str, ...] = self.description.kinds
        """What is kept of every tensor: `master` (the fp32 weights), `exp_avg`, `exp_avg_sq`, `ema`."""
        self.tensors = {p.name: torch.Size(p.shape) for p in self.description.parameters}
        """Shapes of the trained weights, in the module's order."""
        self.shared = {name: info.shape for name, info in self._files.shared.items()}
        """Shapes of frozen parameters and buffers, which have no moments: `read(SHARED, name)`."""
        self.scalars: dict[str, Tensor] = self._files.scalars
        """What the optimizer keeps once, such as `step`."""

    def shape(self, kind: str, name: str) -> torch.Size:
        """Raises StoreError for a kind or name that the checkpoint does not hold."""
        held = self.shared if kind == SHARED else self.tensors if kind in self.kinds else None
        if held is None:
            raise StoreError(f"{self.folder}: holds no {kind}; it holds {', '.join((*self.kinds, SHARED))}")
        if name not in held:
            raise StoreError(f"{self.folder}: holds no {kind} of {name}")
        return held[name]

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """fp32 for all but shared tensors."""
        return self._files.shared[name].dtype if kind == SHARED else torch.float32

    def runs(self, kind: str, name: str) -> Iterator[Tensor]:
        """All elements of a tensor in their order, in pieces of at most 4 MiB."""
        numel = self.shape(kind, name).numel()
        if kind == SHARED:
            yield from self._files.runs_shared(name)
        else:
            yield from self._files.runs(kind, name, 0, numel)

    def read_rows(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The elements [start, stop) of the flattened tensor. Raises StoreError for a range that it does not have."""
        numel = self.shape(kind, name).numel()
        if not 0 <= start <= stop <= numel:
            raise StoreError(f"{self.folder}: {name} has {numel} elements, and [{start}, {stop}) was asked for")
        if kind == SHARED:
            return self._files.read_shared(name).flatten()[start:stop]
        rows = torch.empty(stop - start)
        at = 0
        for run in self._files.runs(kind, name, start, stop):
            rows[at : at + run.numel()] = run
            at += run.numel()
        return rows

    def read(self, kind: str, name: str) -> Tensor:
        """One whole tensor."""
        shape = self.shape(kind, name)
        return self.read_rows(kind, name, 0, shape.numel()).view(shape)

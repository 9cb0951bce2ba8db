"""Which parameters a rank updates: ZeRO's flat rows, one for each kind of parameter, cut into equal parts over the ranks that share it.

The fullest rank is looked for, because parts are equal but the parameters that reach into them are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import nn

from m2mkd_ds.moe.experts import Experts


@dataclass(frozen=True)
class FlatRow:
    """One optimizer group."""

    names: tuple[str, ...]
    numels: tuple[int, ...]
    ranks: int
    """That share its optimizer state."""

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @property
    def padded(self) -> int:
        """Rounded up to two elements a rank, as DeepSpeed aligns it."""
        unit = 2 * self.ranks
        return -(-self.numel // unit) * unit

    @property
    def part(self) -> int:
        """Elements of one rank's part."""
        return self.padded // self.ranks

    def reaching(self, rank: int) -> tuple[str, ...]:
        """Parameters of which at least one element lies in part `rank`."""
        low, high = rank * self.part, (rank + 1) * self.part
        starts = [0, *accumulate(self.numels)]
        placed = zip(self.names, starts, self.numels, strict=False)  # one start more than names: the end of the row
        return tuple(name for name, start, numel in placed if start < high and start + numel > low)


@dataclass(frozen=True)
class Partition:
    """All rows of a trained module."""

    rows: tuple[FlatRow, ...]
    spread: frozenset[str]
    """Names of parameters of experts that are spread over ranks."""
    ranks: int

    @cached_property
    def numels(self) -> dict[str, int]:
        """Elements by parameter, of this rank."""
        return {name: numel for row in self.rows for name, numel in zip(row.names, row.numels, strict=True)}

    @property
    def padded(self) -> int:
        """Elements of the module on this rank, with padding."""
        return sum(row.padded for row in self.rows)

    @property
    def part(self) -> int:
        """Elements that a rank updates."""
        return sum(row.part for row in self.rows)

    @cached_property
    def own(self) -> frozenset[str]:
        """Parameters that reach into the parts of the fullest rank."""
        found = [frozenset(name for row in self.rows for name in row.reaching(rank % row.ranks)) for rank in range(self.ranks)]
        return max(found, key=lambda names: sum(self.numels[name] for name in names))


def partition(module: nn.Module, ranks: int, ep_size: int) -> Partition:
    """The rows of `module`, whose experts hold a rank's share already: matrices, which decay, the rest, and both for spread experts."""
    experts = {
        f"{prefix}.{leaf}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, Experts)
        for leaf, _ in layer.named_parameters()
    }
    spread = frozenset(experts if ep_size > 1 else ())
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = {name for name, parameter in named if parameter.ndim > 1 and not name.endswith(("bias", "_token", "pos_embed", "latent"))}
    rows = []
    for is_spread in (False, True):
        for is_matrix in (True, False):
            held = [(n, p.numel()) for n, p in named if (n in spread) == is_spread and (n in matrices) == is_matrix]
            if held:
                rows.append(_row(held, ranks // ep_size if is_spread else ranks))
    return Partition(tuple(rows), spread, ranks)


def _row(held: Sequence[tuple[str, int]], ranks: int) -> FlatRow:
    return FlatRow(tuple(name for name, _ in held), tuple(numel for _, numel in held), ranks)

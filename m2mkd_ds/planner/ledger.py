"""Ledger: bytes of one rank by part, followed through a step, with the moment at which they were the most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PARTS = (
    "weights", "gradients", "masters", "moments", "average", "frozen", "activations", "buffers", "temporary",
)  # fmt: skip
"""weights: of the trained modules, in the precision of the run. masters, moments: fp32, of the optimizer. average: the moving average and
its copy for evaluation. frozen: teacher modules and meta stages. activations: the batch too. buffers: gradients on their way. temporary:
what the optimizer step and collectives allocate for a moment."""


@dataclass(frozen=True)
class Moment:
    """A point in time."""

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Ledger:
    """Parts as they are now, and the fullest moment so far."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0)
        self.peak = Moment("before the first step", dict(self.parts))

    def add(self, part: str, num_bytes: int) -> None:
        """Allocate (or, if negative, release)."""
        self.parts[part] += num_bytes

    def mark(self, when: str, **extra: int) -> None:
        """Look at the sum, with `extra` bytes of parts that are there for this moment only."""
        parts = {name: num_bytes + extra.get(name, 0) for name, num_bytes in self.parts.items()}
        if sum(parts.values()) > self.peak.total:
            self.peak = Moment(when, parts)

    @contextmanager
    def held(self, part: str, num_bytes: int) -> Iterator[None]:
        """Allocated inside the block."""
        self.add(part, num_bytes)
        yield
        self.add(part, -num_bytes)

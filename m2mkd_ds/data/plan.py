"""The data plan: who uses which positions of the stream, as a pure function. What lies at a position is `data/order.py`'s.

Training is one endless stream of positions p = 0, 1, 2, ... Optimizer step t owns positions [t*G, (t+1)*G), G the global
batch. The tail of one epoch shares a step with the head of the next: every sample exactly once an epoch, equal steps on
all ranks, no padding, no drop, whatever N and G are.

Within a step, group g = rank * accumulation + micro_step owns [t*G + g*mb, t*G + (g+1)*mb): one rank with accumulation
2 sees the same groups as two ranks with accumulation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How a step's positions are dealt to ranks and micro-steps."""

    micro_batch_size: int
    accumulation: int
    world: int
    origin: int = 0
    """Position that step 0 begins at. Not 0 only for a run that goes on with another global batch: position - step * global_batch."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "accumulation", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def global_batch(self) -> int:
        """Images an optimizer step."""
        return self.micro_batch_size * self.accumulation * self.world

    def group(self, micro_step: int, rank: int) -> int:
        """Number of the micro-batch within its step, 0 .. world * accumulation - 1."""
        if not (0 <= micro_step < self.accumulation and 0 <= rank < self.world):
            raise ValueError(
                f"micro_step {micro_step} and rank {rank} must lie below accumulation {self.accumulation} and world {self.world}"
            )
        return rank * self.accumulation + micro_step

    def positions(self, step: int, micro_step: int, rank: int) -> range:
        """Stream positions of one micro-batch."""
        first = self.origin + step * self.global_batch + self.group(micro_step, rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def place(self, start: int) -> tuple[int, int, int]:
        """(step, micro_step, rank) of the micro-batch that begins at position `start`: the inverse of `positions`.

        Raises ValueError where no micro-batch begins.
        """
        step, inside = divmod(start - self.origin, self.global_batch)
        group, rest = divmod(inside, self.micro_batch_size)
        if rest or step < 0:
            raise ValueError(
                f"position {start} is not where a micro-batch of {self.micro_batch_size} begins (step 0 begins at {self.origin})"
            )
        rank, micro_step = divmod(group, self.accumulation)
        return step, micro_step, rank


STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """All that is needed to go on with a stream: kept with the weights, counted from finished optimizer steps."""

    seed: int
    fingerprint: str
    """Of the training shards."""
    order: str
    """What `order_name` of data/order.py gives: `global`, `block/16`, ..."""
    position: int
    """Positions used so far: where the next step begins."""
    version: int = STATE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint's record."""
        return asdict(self)

    def check(self, saved: Mapping[str, Any], where: str) -> None:
        """Raises ValueError, naming both sides, when `saved` (a record's) belongs to another stream than this one."""
        for key, ours in self.to_dict().items():
            if saved.get(key) != ours:
                raise ValueError(
                    f"{where}: its data stream has {key} {saved.get(key)}, this run has {ours}; give the run the data and settings that it "
                    "began with, or delete the checkpoints to start again"
                )


def eval_samples(batch: int, rank: int, *, batch_size: int, world: int, num_samples: int) -> range:
    """Samples of one evaluation batch: rank r owns r, r + world, ...; the last batch is short, nothing is repeated."""
    return range(rank, num_samples, world)[batch * batch_size : (batch + 1) * batch_size]


def num_eval_batches(rank: int, *, batch_size: int, world: int, num_samples: int) -> int:
    """Batches of rank `rank`; ranks may differ by one."""
    return -(-len(range(rank, num_samples, world)) // batch_size)

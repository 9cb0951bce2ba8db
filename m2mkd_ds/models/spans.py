"""StageSpan: which consecutive blocks of a whole model a stage holds, and how depths cut a model into spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class StageSpan:
    """Blocks `first_block`..`last_block` (both included) of a model with `num_blocks` blocks."""

    first_block: int
    last_block: int
    num_blocks: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_block <= self.last_block < self.num_blocks:
            raise ValueError(f"span {self.first_block}..{self.last_block} does not fit a model of {self.num_blocks} blocks")

    @property
    def is_first(self) -> bool:
        """Owns patch embedding, tokens and positions."""
        return self.first_block == 0

    @property
    def is_last(self) -> bool:
        """Owns the final norm and the head."""
        return self.last_block == self.num_blocks - 1

    @property
    def blocks(self) -> range:
        """Block numbers in running order."""
        return range(self.first_block, self.last_block + 1)

    @staticmethod
    def whole(num_blocks: int) -> StageSpan:
        """The span of the whole model."""
        return StageSpan(0, num_blocks - 1, num_blocks)


def stage_spans(depths: Sequence[int]) -> tuple[StageSpan, ...]:
    """Cut `sum(depths)` blocks into consecutive spans; depths (2, 3) -> blocks 0..1 and 2..4.

    Raises ValueError when a stage has no block.
    """
    if not depths or min(depths) < 1:
        raise ValueError(f"depths {list(depths)}: every stage needs at least one block")
    ends = list(accumulate(depths))
    total = ends[-1]
    return tuple(StageSpan(end - depth, end - 1, total) for depth, end in zip(depths, ends, strict=True))

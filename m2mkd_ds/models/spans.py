"""StageSpan: which consecutive blocks of a whole model a stage holds. The arithmetic that makes spans is in distill/pairs.py."""

from __future__ import annotations

from dataclasses import dataclass


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

"""The data plan: which sample is used at which place of the training, as a pure function.

Training is one endless stream of positions p = 0, 1, 2, ...; epoch p // N, and within it sample permutation[p % N].
Optimizer step t owns positions [t*G, (t+1)*G), G the global batch. The tail of one epoch shares a step with the head of
the next: every sample exactly once an epoch, equal steps on all ranks, no padding, no drop, whatever N and G are.

Within a step, group g = rank * accumulation + micro_step owns [t*G + g*mb, t*G + (g+1)*mb): one rank with accumulation
2 sees the same groups as two ranks with accumulation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """int64 [num_samples]: the order of epoch `epoch`. Raises ValueError for negative arguments.

    Sorts raw Philox words: numpy promises those bit streams for ever, and makes no such promise for `shuffle`.
    """
    if seed < 0 or epoch < 0 or num_samples < 0:
        raise ValueError(f"seed {seed}, epoch {epoch} and num_samples {num_samples} must not be negative")
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    words_N = np.random.Philox(key=key).random_raw(num_samples)
    return np.argsort(words_N, kind="stable").astype(np.int64, copy=False)


class SampleOrder:
    """Stream position -> sample number; remembers the permutations of the two latest epochs (a batch may touch both)."""

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: an endless stream needs at least one sample")
        self.seed, self.num_samples = seed, num_samples
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.num_samples)
        order_N = self._epochs.get(epoch)
        if order_N is None:
            order_N = permutation(self.seed, epoch, self.num_samples)
            if len(self._epochs) == 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = order_N
        return int(order_N[place])


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How a step's positions are dealt to ranks and micro-steps."""

    micro_batch_size: int
    accumulation: int
    world: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

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
        first = step * self.global_batch + self.group(micro_step, rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def positions(step: int, micro_step: int, rank: int, *, micro_batch_size: int, accumulation: int, world: int) -> range:
    """Stream positions of one micro-batch; see the head of this file. Raises ValueError for numbers out of range."""
    return BatchLayout(micro_batch_size=micro_batch_size, accumulation=accumulation, world=world).positions(step, micro_step, rank)


def eval_samples(batch: int, rank: int, *, batch_size: int, world: int, num_samples: int) -> range:
    """Samples of one evaluation batch: rank r owns r, r + world, ...; the last batch is short, nothing is repeated."""
    return range(rank, num_samples, world)[batch * batch_size : (batch + 1) * batch_size]


def num_eval_batches(rank: int, *, batch_size: int, world: int, num_samples: int) -> int:
    """Batches of rank `rank`; ranks may differ by one."""
    return -(-len(range(rank, num_samples, world)) // batch_size)

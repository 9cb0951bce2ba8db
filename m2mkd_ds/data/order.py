"""The order of the samples: which sample the stream holds at which position, as a pure function.

    global   an epoch is one permutation of all samples
    block    the shards are permuted, and then the samples inside windows of K shards: few shards are in use at a time
    deit     timm's RepeatAugSampler, index for index: repeated augmentation spread over the ranks, tied to their number

With repeats k (stream mode), an epoch has k * N positions and a sample's k uses follow one another. A position's `Slot` is what
augmentation is keyed by, so the same use of a sample has the same pixels on any rank, in any worker, after any resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data_config import DataConfig

_SHARD_WORDS = 1
"""Counter block of the Philox words that permute shards; block 0 permutes samples."""


def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """int64 [num_samples]: the order of epoch `epoch`. Raises ValueError for negative arguments.

    Sorts raw Philox words: numpy promises those bit streams for ever, and makes no such promise for `shuffle`.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples is {num_samples}; it must not be negative")
    return np.argsort(_words(seed, epoch, num_samples), kind="stable").astype(np.int64, copy=False)


def _words(seed: int, epoch: int, count: int, block: int = 0) -> np.ndarray:
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, block]).random_raw(count)


def shard_permutation(seed: int, epoch: int, num_shards: int) -> np.ndarray:
    """int64 [num_shards]: the order of the shards with order=block."""
    return np.argsort(_words(seed, epoch, num_shards, _SHARD_WORDS), kind="stable")


def block_permutation(seed: int, epoch: int, shard_sizes: Sequence[int], window: int) -> np.ndarray:
    """int64 [N]: shards in random order, and the samples of each `window` consecutive ones in random order among themselves."""
    num_samples = sum(shard_sizes)
    shards_S = shard_permutation(seed, epoch, len(shard_sizes))
    window_of_shard_S = np.empty(len(shard_sizes), dtype=np.int64)
    window_of_shard_S[shards_S] = np.arange(len(shard_sizes)) // window
    window_N = np.repeat(window_of_shard_S, np.asarray(shard_sizes, dtype=np.int64))
    # The last key sorts first: by window, and within it by the sample's own word.
    return np.lexsort((_words(seed, epoch, num_samples), window_N)).astype(np.int64, copy=False)


class Slot(NamedTuple):
    """One planned use of a sample: the key of its augmentation."""

    epoch: int
    sample: int
    repeat: int
    """0 .. repeats - 1 within the epoch."""


class SampleOrder(Protocol):
    """Stream position -> slot."""

    epoch_length: int
    """Positions an epoch."""

    def slot(self, position: int) -> Slot:
        """The slot at a stream position >= 0."""
        ...

    def substitutes(self, position: int) -> Iterator[int]:
        """Samples to take when the one at `position` is damaged: the next different ones of its epoch, then those from its start."""
        ...

    def shards_ahead(self, position: int) -> Sequence[int]:
        """Shards by first need from `position` to the end of its epoch."""
        ...

    def window_end(self, position: int) -> int:
        """Position behind the window of shards that `position` lies in; for orders without windows, behind its epoch."""
        ...


class _EpochOrders(ABC):
    """What the orders share: the lists of the two latest epochs (a batch may touch both)."""

    repeats = 1
    epoch_length: int

    def __init__(self, shard_sizes: Sequence[int]) -> None:
        self.num_samples = sum(shard_sizes)
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}: an endless stream needs at least one sample")
        self._shard_ends = np.cumsum(np.asarray(shard_sizes, dtype=np.int64))
        self._epochs: dict[int, np.ndarray] = {}

    @abstractmethod
    def _make(self, epoch: int) -> np.ndarray:
        """Samples of an epoch in order, each once (stream) or as often as it is used (deit)."""

    def _epoch(self, epoch: int) -> np.ndarray:
        order = self._epochs.get(epoch)
        if order is None:
            order = self._make(epoch)
            if len(self._epochs) == 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = order
        return order

    @abstractmethod
    def _place(self, position: int) -> tuple[int, int]:
        """(epoch, place in the epoch's list)."""

    def substitutes(self, position: int) -> Iterator[int]:
        epoch, place = self._place(position)
        order = self._epoch(epoch)
        tried = {int(order[place])}
        for i in range(place + 1, place + len(order)):
            sample = int(order[i % len(order)])
            if sample not in tried:
                tried.add(sample)
                yield sample

    def shards_ahead(self, position: int) -> Sequence[int]:
        epoch, place = self._place(position)
        rest = self._epoch(epoch)[place:]
        shards, first = np.unique(np.searchsorted(self._shard_ends, rest, side="right"), return_index=True)
        return [int(shards[i]) for i in np.argsort(first)]

    def window_end(self, position: int) -> int:
        return (position // self.epoch_length + 1) * self.epoch_length


class StreamOrder(_EpochOrders):
    """Orders `global` and `block`, with a sample's repeats one after the other. Does not depend on ranks."""

    def __init__(
        self, seed: int, shard_sizes: Sequence[int], *, mode: Literal["global", "block"] = "global", window: int = 16, repeats: int = 1
    ) -> None:
        super().__init__(shard_sizes)
        if window < 1 or repeats < 1:
            raise ValueError(f"window is {window} and repeats is {repeats}; both must be at least 1")
        self.seed, self.mode, self.window, self.repeats = seed, mode, window, repeats
        self._shard_sizes = tuple(shard_sizes)
        self.epoch_length = self.num_samples * repeats

    def _make(self, epoch: int) -> np.ndarray:
        if self.mode == "block":
            return block_permutation(self.seed, epoch, self._shard_sizes, self.window)
        return permutation(self.seed, epoch, self.num_samples)

    def _place(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.epoch_length)
        return epoch, place // self.repeats

    def window_end(self, position: int) -> int:
        if self.mode != "block":
            return super().window_end(position)
        epoch, place = self._place(position)
        ends = np.cumsum(np.asarray(self._shard_sizes)[shard_permutation(self.seed, epoch, len(self._shard_sizes))])
        window_ends = np.append(ends[self.window - 1 :: self.window], self.num_samples)
        end = window_ends[np.searchsorted(window_ends, place, side="right")]
        return epoch * self.epoch_length + int(end) * self.repeats

    def slot(self, position: int) -> Slot:
        epoch, place = self._place(position)
        return Slot(epoch, int(self._epoch(epoch)[place]), position % self.repeats)


class DeitOrder(_EpochOrders):
    """timm's RepeatAugSampler (after DeiT): rank r's n-th sample is the one that its sampler of rank r gives.

    timm seeds an epoch with its number; here it is seed + epoch, so seed 0 is timm's. An epoch has about N positions, which
    hold about N / repeats different samples. The order belongs to one number of ranks.
    """

    SELECTED_ROUND = 256
    """timm (and DeiT) round the samples of an epoch down to a multiple of this, where there are as many."""

    def __init__(self, seed: int, shard_sizes: Sequence[int], *, layout: BatchLayout, repeats: int) -> None:
        super().__init__(shard_sizes)
        if layout.origin:
            raise ValueError(
                f"repeat_mode=deit belongs to one global batch, but step 0 of this run lies at position {layout.origin}; "
                "go on with the batch that the run began with"
            )
        self.seed, self.layout, self.repeats = seed, layout, repeats
        world = layout.world
        per_rank = -(-self.num_samples * repeats // world)
        rounded = self.num_samples // self.SELECTED_ROUND * self.SELECTED_ROUND
        selected = rounded // world if rounded else -(-self.num_samples // world)
        self._per_rank = min(selected, per_rank)
        if self._per_rank < 1:
            raise ValueError(f"repeat_mode=deit gives no samples to {world} ranks from {self.num_samples} images; use repeat_mode=stream")
        self.epoch_length = self._per_rank * world

    def _make(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        shuffled_N = torch.randperm(self.num_samples, generator=generator).numpy()
        # np.resize begins again where the list ends, as the sampler's padding does.
        return np.resize(np.repeat(shuffled_N, self.repeats), self.epoch_length)

    def _place(self, position: int) -> tuple[int, int]:
        step, inside = divmod(position, self.layout.global_batch)
        group, place = divmod(inside, self.layout.micro_batch_size)
        rank, micro_step = divmod(group, self.layout.accumulation)
        nth = (step * self.layout.accumulation + micro_step) * self.layout.micro_batch_size + place
        epoch, in_epoch = divmod(nth, self._per_rank)
        return epoch, in_epoch * self.layout.world + rank

    def slot(self, position: int) -> Slot:
        epoch, place = self._place(position)
        # A padded list begins anew behind its end: those uses get numbers of their own, too.
        lap, copy = divmod(place, self.num_samples * self.repeats)
        return Slot(epoch, int(self._epoch(epoch)[place]), lap * self.repeats + copy % self.repeats)


def make_order(data: DataConfig, seed: int, shard_sizes: Sequence[int], layout: BatchLayout) -> SampleOrder:
    """The order that `data.order` and `data.augment.repeats` ask for. Raises ValueError when it is impossible."""
    augment = data.augment
    if augment.repeats_as_deit:
        return DeitOrder(seed, shard_sizes, layout=layout, repeats=augment.repeats)
    return StreamOrder(seed, shard_sizes, mode=data.order, window=data.order_window, repeats=augment.repeats)


def order_name(data: DataConfig, layout: BatchLayout) -> str:
    """The order in a word, for a checkpoint: `global`, `block/16`, `global*3`, `deit*3@128x1x8` (which is tied to its layout)."""
    augment = data.augment
    if augment.repeats_as_deit:
        return f"deit*{augment.repeats}@{layout.micro_batch_size}x{layout.accumulation}x{layout.world}"
    name = f"block/{data.order_window}" if data.order == "block" else "global"
    return f"{name}*{augment.repeats}" if augment.repeats > 1 else name

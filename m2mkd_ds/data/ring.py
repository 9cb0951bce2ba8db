"""Image memory that a loader's workers fill in turn: shared once, at their start, in place of new shared memory for every batch.

New shared memory costs a page fault every 4 KiB, in the worker and again in the training process. Which memory a batch lies in is
decided here, in the training process: a place is lent with the number of a batch, and free again when the batch has been copied from it.
Whoever finds no free place is lent none, and makes memory of his own: a place that is never given back costs speed alone.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Memory that was lent to one batch."""

    ring: int
    lap: int
    """Iteration of the loader: what is given back after the next one began is ignored, for it may be lent again."""
    number: int


class Turn(NamedTuple):
    """What a worker is asked for."""

    batch: int
    place: Place | None


class Ring:
    """`count` places for batches of a shape. Made in the training process and sent to its workers, who only write where they are told."""

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.key = next(_keys)
        self._memory = shared_tensor((count, *shape), dtype)
        self._lock = threading.Lock()
        self._lap, self._free = 0, list(range(count))
        _rings[self.key] = self

    def __getstate__(self) -> dict[str, Tensor]:
        return {"_memory": self._memory}

    def images(self, place: Place, count: int) -> Tensor:
        """The memory of a place, as many images as the batch has."""
        return self._memory[place.number, :count]

    def turns(self, batches: range) -> Iterator[Turn]:
        """Each batch with a place as it is asked for. All places are free at the first one: then no worker has anything to do."""
        with self._lock:
            self._lap, self._free = self._lap + 1, list(range(len(self._memory)))
        for batch in batches:
            with self._lock:
                place = Place(self.key, self._lap, self._free.pop()) if self._free else None
            yield Turn(batch, place)

    def give_back(self, place: Place) -> None:
        """The place may be written to again."""
        with self._lock:
            if place.lap == self._lap and place.number not in self._free:
                self._free.append(place.number)


_keys = itertools.count()
_rings: weakref.WeakValueDictionary[int, Ring] = weakref.WeakValueDictionary()


def ring_of(place: Place) -> Ring:
    """The ring that lent a place, in the process that made it."""
    return _rings[place.ring]


class Turns:
    """The batches of a loader as a DataLoader's sampler, lent places of a ring."""

    def __init__(self, ring: Ring, batches: range) -> None:
        self._ring, self._batches = ring, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Turn]:
        return self._ring.turns(self._batches)


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that other processes can be sent without a copy."""
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)

"""CollectiveTime: how long a rank is inside torch.distributed's collectives, whoever calls them (our code, DeepSpeed).

    with timed_collectives() as clock:      (before the job is joined: DeepSpeed keeps some of the functions that it finds then)
        ...; clock.take() -> (seconds, calls, bytes) since the last take

Time inside a collective is transport and waiting for the slowest rank, which cannot be told apart from outside; the rank that waited least
is the best bound for transport. Only the outermost call counts. A call with async_op=True returns before anything was sent, so it is
counted as not measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

NAMES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
)  # fmt: skip
"""Functions of torch.distributed that are timed; one that a release lacks is left out."""


@dataclass(frozen=True)
class Taken:
    """What happened between two calls of `take`."""

    seconds: float
    calls: int
    num_bytes: int
    """Of the tensors handed in (the first argument), not of what crossed a wire."""
    unmeasured: int
    """Calls with async_op=True."""


class CollectiveTime:
    """Sums of one process."""

    def __init__(self) -> None:
        self._depth = 0
        self._start()

    def _start(self) -> None:
        self._seconds, self._calls, self._bytes, self._unmeasured = 0.0, 0, 0, 0

    def take(self) -> Taken:
        """The sums since the last call."""
        taken = Taken(self._seconds, self._calls, self._bytes, self._unmeasured)
        self._start()
        return taken

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self._seconds += time.perf_counter() - began
                self._calls += 1
                self._unmeasured += bool(kwargs.get("async_op", False))
                self._bytes += _size(args[0] if args else next(iter(kwargs.values()), None))

        return timed


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


@contextmanager
def timed_collectives() -> Iterator[CollectiveTime]:
    """Replace torch.distributed's functions inside the block."""
    clock = CollectiveTime()
    originals = {name: getattr(torch.distributed, name) for name in NAMES if hasattr(torch.distributed, name)}
    for name, function in originals.items():
        setattr(torch.distributed, name, clock.wrap(function))
    try:
        yield clock
    finally:
        for name, function in originals.items():
            setattr(torch.distributed, name, function)

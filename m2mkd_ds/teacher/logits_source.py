"""Teacher logits from elsewhere, images and hidden states from here: the feed for payload=logits.

The trainer reads the shards and runs the prefix itself (a feed without teachers), and only 2 KB an image come from a source: a server,
or files (replay.py). Shape letters: B images, V classes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed


class LogitsSource(Protocol):
    """Whoever has the teacher's logits for the slots of a plan."""

    def logits(self, request: BatchRequest) -> dict[int, Tensor]:
        """Logits [B, V] of `request.pairs` for exactly `request.slots`, on the CPU. Raises RuntimeError or ValueError saying why not."""
        ...

    def metrics(self) -> dict[str, float]:
        """As TeacherFeed.metrics."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class WithLogits:
    """A TeacherFeed made of `base`, which is never asked for a teacher, and of the logits of `source`."""

    def __init__(self, base: TeacherFeed, source: LogitsSource, *, device: torch.device, dtype: torch.dtype) -> None:
        self._base, self._source = base, source
        self._device, self._dtype = device, dtype

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """The batch of `base` with the teacher's logits, if they are asked for."""
        batch = self._base.batch(replace(request, with_teacher=False))
        if not request.with_teacher:
            return batch
        began = time.monotonic()
        logits = self._source.logits(request)
        return with_logits(batch, logits, began, device=self._device, dtype=self._dtype)

    def metrics(self) -> dict[str, float]:
        """Those of both."""
        return {**self._base.metrics(), **self._source.metrics()}

    def close(self) -> None:
        """Close both, the source first: it may have threads that wait."""
        try:
            self._source.close()
        finally:
            self._base.close()


def with_logits(batch: TeacherBatch, logits: dict[int, Tensor], began: float, *, device: torch.device, dtype: torch.dtype) -> TeacherBatch:
    """`batch` with logits by pair on `device`; the time since `began` (monotonic) counts as waited for."""
    moved = {i: logits_BV.to(device, dtype, non_blocking=True) for i, logits_BV in logits.items()}
    return replace(batch, teacher_logits=moved, wait_s=batch.wait_s + time.monotonic() - began)

"""The one door between teachers and trainers: TeacherFeed.batch(request) -> TeacherBatch.

Batches are addressed by *slots* (planned uses of samples, `data.plan`), so whoever answers holds only a cache: the
trainer owns the cursor. `colocated` answers in the trainer's own process; other feeds answer the same bytes from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from m2mkd_ds.data.bad_samples import BadSample


@dataclass(frozen=True)
class BatchRequest:
    """One rank's micro-batch: optimizer step, micro-step, and the slots that the plan gives it."""

    step: int
    micro_step: int
    slots: range
    pairs: tuple[int, ...]
    """Teaching pairs whose hidden states are wanted."""
    with_teacher: bool
    """Whether teacher logits are wanted too."""


@dataclass(frozen=True)
class TeacherBatch:
    """What students train on. Shape letters: B images, L tokens, D teacher width, V classes."""

    hidden: dict[int, Tensor]
    """h_i by pair: the image [B, 3, H, W] for pair 0, else [B, L, D]."""
    teacher_logits: dict[int, Tensor]
    """Logits [B, V] of the teacher hybrid by pair; empty when not asked for."""
    targets_BV: Tensor
    """Class probabilities after mixup and label smoothing, fp32."""
    slot_ids_B: Tensor
    """Stream positions, int64: the batch's identity in logs and errors."""
    bad: tuple[BadSample, ...] = ()
    """Damaged samples that were replaced in this batch."""
    lost: str = ""
    """Why the batch has no images (nothing could be read): zeros, to keep in step with other ranks until all of them stop."""
    wait_s: float = 0.0
    """Seconds that the images were waited for."""
    fallbacks: int = 0
    """Images that the fast decoder could not take."""


class TeacherFeed(Protocol):
    """Anything that answers requests in the order of the plan."""

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """The batch for exactly `request.slots`. Raises RuntimeError when it cannot be had."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers for the log, each counted since the last call; empty for feeds without any. Same keys on every rank."""
        ...

    def close(self) -> None:
        """Release workers and connections."""
        ...

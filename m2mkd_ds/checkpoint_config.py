"""CheckpointConfig: how checkpoints are written and which of them stay. A branch of the tree in config.py, which re-exports it.

None of its fields changes a bit of a result, so none is part of a node's fingerprint: they may be changed in the middle of a run.
How often a phase saves is the phase's own (`PHASE.checkpoint_steps`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

CHECKPOINT_LIMITS: dict[str, tuple[float, float]] = {
    "keep_last": (1, inf), "keep_every": (0, inf), "keep_best": (0, inf), "deadline_s": (0.001, inf),
}  # fmt: skip
"""Smallest and largest allowed value by field."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written, and which stay."""

    asynchronous: bool = False
    """true: training waits only while the state is copied; a thread of each rank writes the copy and commits it. An error of that thread
    stops all ranks at the end of a later step. false: training waits until the checkpoint is on the disk."""
    deadline_s: float = 600.0
    """Seconds that rank 0 waits for the other ranks' parts when its own is written; then the save has failed. Others wait twice as long."""
    keep_last: int = 2
    """The newest so many checkpoints stay; an older one goes only when the next is on the disk."""
    keep_every: int = 0
    """Checkpoints of steps that this divides stay for ever; 0: none do."""
    keep_best: int = 0
    """The so many checkpoints with the best top-1 on the validation images stay. With it, every evaluation is followed by a checkpoint.
    0: scores play no part."""
    after_done: Literal["keep", "last", "none"] = "keep"
    """When the phase is done and its weights are written: keep all of its checkpoints, the last one only, or none."""

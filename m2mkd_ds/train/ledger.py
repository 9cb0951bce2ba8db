"""Proof that every slot of the plan was trained on exactly once: count and hash of what came, over all ranks, against the plan's.

Whoever delivers batches (this process, servers that died and came back, files), the sums must be those of the plan.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distributed.world import World, all_reduce_sum


class SlotLedgerError(RuntimeError):
    """Some slot was lost or used twice; the message says in which steps."""


class SlotLedger:
    """One rank's sums since step `start`; `check` compares those of all ranks and begins anew."""

    def __init__(self, layout: BatchLayout, start: int, world: World) -> None:
        self._layout, self._start, self._world = layout, start, world
        self._count, self._hash = 0, 0

    def add(self, slot_ids_B: Tensor) -> None:
        """Positions of one micro-batch that was trained on."""
        self._count += len(slot_ids_B)
        self._hash = (self._hash + slot_hash(slot_ids_B.numpy())) % 2**64

    def check(self, step: int) -> None:
        """After step `step` - 1: raises SlotLedgerError, on every rank, when the ranks' sums are not the plan's. Collective."""
        planned = np.arange(self._layout.positions(self._start, 0, 0).start, self._layout.positions(step, 0, 0).start)
        sums = torch.tensor([self._count, _signed(self._hash)], device=self._world.device)
        count, hashed = all_reduce_sum(sums).tolist()  # int64 sums wrap, as the hash does
        if (count, hashed) != (len(planned), _signed(slot_hash(planned))):
            raise SlotLedgerError(
                f"steps {self._start} to {step - 1} should have used {len(planned)} slots of the plan once each; {count} came, with "
                "another sum of hashes: a batch was lost or used twice. The weights since the last checkpoint are not those of the "
                "plan; start again by the same command, and report this as a bug of the teacher feed"
            )
        self._start, self._count, self._hash = step, 0, 0


def slot_hash(positions_B: np.ndarray) -> int:
    """Sum, modulo 2^64, of a mixed word for each position (splitmix64): it depends on the set and not on the order."""
    with np.errstate(over="ignore"):
        x = positions_B.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(np.add.reduce(x ^ (x >> np.uint64(31)), dtype=np.uint64))


def _signed(word: int) -> int:
    """The same 64 bits as a signed number: what a tensor can hold."""
    return word - 2**64 if word >= 2**63 else word

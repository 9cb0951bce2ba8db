"""Memory for received answers, used again once nobody holds a tensor in it.

Fresh memory for a batch of 52 MB costs its page faults: three times to six times what copying into memory in use costs.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

_GRAIN_BYTES = 1024 * 1024


class ReceiveBuffers:
    """Lends memory and takes it back by itself; keeps at most `keep` pieces that nobody uses. Safe to use from several threads."""

    def __init__(self, keep: int) -> None:
        # No lock: memory may come back whenever the garbage collector runs, inside `lend` too. A deque's own steps are atomic.
        self._free: deque[Tensor] = deque(maxlen=keep)

    def lend(self, num_bytes: int) -> Tensor:
        """A flat uint8 tensor. Its memory is used again when it and all its views are gone, whoever held them, and not before."""
        raw = self._fitting(num_bytes)
        if raw is None:
            raw = torch.empty(max(1, -(-num_bytes // _GRAIN_BYTES)) * _GRAIN_BYTES, dtype=torch.uint8)
        # torch keeps the array object, and nobody else does, until the last tensor over its memory is gone.
        loan = raw.numpy()
        weakref.finalize(loan, self._free.append, raw).atexit = False
        return torch.from_numpy(loan)[:num_bytes]

    @property
    def num_free(self) -> int:
        """Pieces that nobody uses."""
        return len(self._free)

    def _fitting(self, num_bytes: int) -> Tensor | None:
        for _ in range(len(self._free)):
            try:
                raw = self._free.popleft()
            except IndexError:
                return None
            if num_bytes <= len(raw) <= 2 * num_bytes + _GRAIN_BYTES:
                return raw
            self._free.append(raw)
        return None

"""Memory for received answers, used again once nobody holds a tensor in it.

Fresh memory for a batch of 52 MB costs its page faults, which take two to six times as long as copying into memory in use. Large pages make
both quicker, and they begin where copying is at its best.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_PAGE_BYTES = 2 * 1024 * 1024


class ReceiveBuffers:
    """Lends memory and takes it back by itself; keeps at most `keep` pieces that nobody uses. Safe to use from several threads."""

    def __init__(self, keep: int) -> None:
        # No lock: memory may come back whenever the garbage collector runs, inside `lend` too. A deque's own steps are atomic.
        self._free: deque[mmap.mmap] = deque(maxlen=keep)

    def lend(self, num_bytes: int) -> Tensor:
        """A flat uint8 tensor. Its memory is used again when it and all its views are gone, whoever held them, and not before."""
        raw = self._fitting(num_bytes) or _large_pages(num_bytes)
        # torch keeps the array object, and nobody else does, until the last tensor over its memory is gone.
        loan = np.frombuffer(raw, dtype=np.uint8)
        weakref.finalize(loan, self._free.append, raw).atexit = False
        return torch.from_numpy(loan)[:num_bytes]

    @property
    def num_free(self) -> int:
        """Pieces that nobody uses."""
        return len(self._free)

    def _fitting(self, num_bytes: int) -> mmap.mmap | None:
        for _ in range(len(self._free)):
            try:
                raw = self._free.popleft()
            except IndexError:
                return None
            if num_bytes <= len(raw) <= 2 * num_bytes + _PAGE_BYTES:
                return raw
            self._free.append(raw)
        return None


def _large_pages(num_bytes: int) -> mmap.mmap:
    raw = mmap.mmap(-1, max(1, -(-num_bytes // _PAGE_BYTES)) * _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        raw.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them: slower the first time, and otherwise the same
    return raw

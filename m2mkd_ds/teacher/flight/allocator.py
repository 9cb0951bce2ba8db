"""glibc's malloc, told not to give memory back that is needed again at once.

gRPC receives an answer into fresh blocks of some 100 KB to 1 MB and frees them a moment later. By default malloc returns such memory to
the kernel, which clears it for the next answer: thousands of page faults, about a third of a client's processor time.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
MMAP_BYTES, TRIM_BYTES = 32 * 2**20, 64 * 2**20
"""Where glibc's own adaptation ends once a process has freed a block of 32 MiB; here from the start. So at most 64 MiB are kept."""


def keep_freed_memory() -> bool:
    """For this process, from now on. False where somebody else decided (environment), or where malloc is not glibc's."""
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, MMAP_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, TRIM_BYTES))

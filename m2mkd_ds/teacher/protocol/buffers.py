"""Receive buffers that are used again, for every transport: fresh memory for an answer costs its page faults, which take two to six times
as long as copying into memory in use. Large pages make both quicker.

    pool.take(bytes) -> Arena -> arena.tensor(...), as many as fit -> Answer -> trainer

An arena comes back to its pool by itself when the last tensor in it, or view of one, is gone: memory that anybody still holds is
never overwritten, whether or not `Answer.release` was called. Only queued copies to a device can outlive their tensors. So an arena of
page-locked memory is used again after the event that `release` was given, or, without one, after the whole device was waited for.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from m2mkd_ds.teacher.protocol.wire import Event, LinkError

ALIGN = 64
"""Bytes; as torch's own memory, so that vectorised loops take the same way through it."""
_STEP = 2**20
"""Buffers are multiples of it: answers that differ by a few erased boxes fit the same ones."""
_LARGE_PAGE = 2 * 2**20
MAX_BUFFERS, MAX_POOL_BYTES = 1024, 2**40
"""Of a link's own pool: as many as answers are alive at a time, which the trainer's prefetch bounds."""


@dataclass
class _Buffer:
    """Memory, and what has to happen before it is written to again."""

    bytes_N: Tensor
    is_dirty: bool = False
    """Page-locked, and copies from it may still be queued."""
    after: Event | None = None


class Arena:
    """One borrowed buffer, to be filled with tensors one after the other; the `Lease` of an answer."""

    def __init__(self, buffer: _Buffer, back: queue.SimpleQueue[_Buffer], num_bytes: int) -> None:
        self._buffer, self._used = buffer, 0
        # Every tensor keeps this very object alive, and nothing else does once the arena is gone.
        self._view: memoryview | None = memoryview(buffer.bytes_N.numpy())[:num_bytes]  # type: ignore[arg-type]  # numpy arrays are buffers
        # SimpleQueue.put may run at any time, in any thread, even inside another call of the same queue.
        weakref.finalize(self._view, back.put, buffer).atexit = False

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, unset. `take` must have been asked for the sum of `padded` sizes."""
        assert self._view is not None, "tensors are made before the lease ends"
        count = prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        start, self._used = self._used, self._used + padded(count * dtype.itemsize)
        return torch.frombuffer(self._view, dtype=dtype, count=count, offset=start).view(tuple(shape))

    def end(self, after: Event | None) -> None:
        """Let go; the buffer comes back when all tensors are gone, and is used again after `after`."""
        if self._view is not None:
            self._buffer.after, self._view = after, None


def padded(num_bytes: int) -> int:
    """What a tensor of `num_bytes` takes up in an arena."""
    return -(-num_bytes // ALIGN) * ALIGN


class BufferPool:
    """At most `max_buffers` buffers of at most `max_bytes` together; safe to use from several threads.

    `pinned`: page-locked, for copies to a GPU that do not block. Give as many buffers as answers can be alive at a time: those being
    received, those waiting, and those that the trainer works on.
    """

    def __init__(self, max_buffers: int, max_bytes: int, *, pinned: bool = False) -> None:
        if min(max_buffers, max_bytes) < 1:
            raise ValueError(f"a pool of {max_buffers} buffers of {max_bytes} bytes together can hold nothing; give at least 1 of each")
        self.max_buffers, self.max_bytes, self.pinned = max_buffers, max_bytes, pinned
        self._back: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._idle: list[_Buffer] = []
        self._sizes: list[int] = []
        """Of all buffers, idle or lent."""
        self._lock = threading.Lock()

    @property
    def num_buffers(self) -> int:
        """That there are now."""
        return len(self._sizes)

    @property
    def num_bytes(self) -> int:
        """Of all buffers that there are now."""
        return sum(self._sizes)

    def take(self, num_bytes: int, wait_s: float = 60.0) -> Arena:
        """A buffer of at least `num_bytes`.

        Raises LinkError: corrupt when the pool can never hold them, deadline when none came back; OSError, MemoryError or RuntimeError
        where the system has no memory.
        """
        if num_bytes > self.max_bytes:
            raise LinkError("corrupt", f"an answer of {num_bytes} bytes; the receive buffers may hold {self.max_bytes} together")
        deadline = time.monotonic() + wait_s
        while True:
            with self._lock:
                self._collect()
                buffer = self._fitting(num_bytes) or self._made(num_bytes)
            if buffer is not None:
                self._wait_for_device(buffer)
                return Arena(buffer, self._back, num_bytes)
            try:
                returned = self._back.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LinkError(
                    "deadline", f"no receive buffer came back within {wait_s:g} s: all {self.num_buffers} hold answers that are in use"
                ) from None
            with self._lock:
                self._idle.append(returned)

    def _collect(self) -> None:
        while not self._back.empty():
            try:
                self._idle.append(self._back.get_nowait())
            except queue.Empty:  # another thread waits in `take` and was faster
                return

    def _fitting(self, num_bytes: int) -> _Buffer | None:
        """The smallest idle buffer that is large enough, and not so large that a small answer would keep a large one waiting."""
        fitting = [buffer for buffer in self._idle if num_bytes <= len(buffer.bytes_N) <= 2 * num_bytes + _LARGE_PAGE]
        if not fitting:
            return None
        buffer = min(fitting, key=lambda b: len(b.bytes_N))
        # By identity: comparing buffers would compare tensors.
        self._idle = [other for other in self._idle if other is not buffer]
        return buffer

    def _made(self, num_bytes: int) -> _Buffer | None:
        """A new buffer, in place of idle ones that are too small if need be; None when too much is lent."""
        size = min(-(-max(num_bytes, 1) // _STEP) * _STEP, self.max_bytes)
        while len(self._sizes) >= self.max_buffers or self.num_bytes + size > self.max_bytes:
            if not self._idle:
                return None
            dropped = self._idle.pop(0)
            self._wait_for_device(dropped)
            self._sizes.remove(len(dropped.bytes_N))
        buffer = _Buffer(torch.empty(size, dtype=torch.uint8, pin_memory=True) if self.pinned else _large_pages(size))
        self._sizes.append(size)
        return buffer

    def _wait_for_device(self, buffer: _Buffer) -> None:
        """Until no queued copy reads the buffer any more."""
        if buffer.after is not None:
            buffer.after.synchronize()
        elif buffer.is_dirty:
            torch.cuda.synchronize()
        buffer.after, buffer.is_dirty = None, self.pinned


def _large_pages(num_bytes: int) -> Tensor:
    """Fresh memory in large pages. Raises OSError or OverflowError where there is none."""
    raw = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        raw.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them: slower the first time, and otherwise the same
    return torch.frombuffer(raw, dtype=torch.uint8)

"""Where an answer's tensors lie between two processes of a host: memory without a name (memfd), one segment a lane (frames.py).

    segment    a header page (magic, generation), then the tensors in the order of the answer's head, each at a multiple of 64 bytes

The server makes the segment, seals its size, and sends its descriptor once. Nothing has to be removed: the kernel frees the memory when the
last process that has it ends, by kill -9 as well. The generation is counted up before a segment is written; a reader that finds another
one than it was told, before or after copying, has lost it. What a reader hands out is a copy: nobody can change it afterwards.

Sums are those of the codec, over pieces that stay in a core's cache between copying and summing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.buffers import BufferPool
from m2mkd_ds.teacher.protocol.wire import TORCH_DTYPES, Answer, LinkError
from m2mkd_ds.teacher.shm.frames import Ready

HEADER_BYTES = 4096
PIECE_BYTES = 512 * 1024
"""Summing a piece of this size just after copying costs a sixth of the copy; over 2 MiB the piece has left the cache again: a half."""
ALIGNMENT = 64
ROUND_BYTES = 1024 * 1024
"""Segments are multiples of it, so that answers of almost one size fit the segment that is there."""
_HEADER = struct.Struct("<8sQ")
_MAGIC = b"m2mkdshm"
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python's fcntl has no name for it
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin behind the header page, and where the last one ends."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def segment_bytes(answer: Answer) -> int:
    """Size of a segment that this answer fits into."""
    _, end = places([tensor.numel() * tensor.element_size() for tensor in answer.tensors.values()])
    return _rounded(end)


def largest_segment(max_answer_bytes: int) -> int:
    """Size of the largest segment that answers of up to so many bytes can need."""
    return _rounded(max_answer_bytes + ALIGNMENT * codec.MAX_TENSORS)


def _rounded(num_bytes: int) -> int:
    return HEADER_BYTES + max(1, -(-num_bytes // ROUND_BYTES)) * ROUND_BYTES


class Segment:
    """The server's side: made, written and closed by one lane."""

    def __init__(self, num_bytes: int) -> None:
        """`num_bytes` as `segment_bytes` gives it. Raises OSError when there is no memory for it."""
        self.num_bytes, self.generation = num_bytes, 0
        self.fd = os.memfd_create("m2mkd_teacher", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, num_bytes)  # an error here, not a bus error when it is written
            self._map = mmap.mmap(self.fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            _seal_against_writing(self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        self._data = np.frombuffer(self._map, dtype=np.uint8)

    def write(self, answer: Answer) -> Ready:
        """Copy the tensors of an answer in; they must fit. Raises ValueError when its head is too large to be sent."""
        self.generation += 1
        _HEADER.pack_into(self._map, 0, _MAGIC, self.generation)
        flat = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in answer.tensors.values()]
        starts, end = places([len(array) for array in flat])
        assert HEADER_BYTES + end <= self.num_bytes
        head = codec.head_of(answer)
        sums = [codec.checksum(head)]
        for start, array in zip(starts, flat, strict=True):
            room = self._data[HEADER_BYTES + start :][: len(array)]
            sums.extend(_copy(room, array))
        return Ready(self.generation, self.num_bytes, head, codec.tail_bytes(sums, answer.num_bytes))

    def close(self) -> None:
        """Give the memory back, once the other side has let it go as well."""
        del self._data, self._map  # not closed: the frames of an error may still hold views of it, and take it with them when they go
        os.close(self.fd)


class SegmentView:
    """The client's side: a segment mapped for reading."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """`fd` may be closed afterwards. Raises LinkError(corrupt) unless it is a segment of that size that nobody can cut short."""
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS == _SIZE_SEALS
        except OSError:
            sealed = False
        # A file that may shrink would end this process by a bus error.
        if not sealed or os.fstat(fd).st_size != num_bytes:
            raise LinkError("corrupt", "the descriptor that came is no sealed segment of the announced size")
        self._map = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        self.num_bytes = num_bytes
        self._data = np.frombuffer(self._map, dtype=np.uint8)

    def read(
        self, ready: Ready, pool: BufferPool, max_bytes: int, accept: codec.Accept | None = None, *, wait_s: float = 60.0
    ) -> Answer:
        """A copy of the answer, in memory of `pool`.

        Raises LinkError, corrupt for anything but the announced bytes and deadline when no memory came back for `wait_s`, and what
        `accept` raises.
        """
        head, specs = codec.parse_head(ready.head, max_bytes)
        if accept is not None:
            accept(head, specs)
        sizes = [spec.num_bytes for spec in specs]
        starts, end = places(sizes)
        if len({spec.name for spec in specs}) != len(specs) or HEADER_BYTES + end > self.num_bytes:
            raise LinkError("corrupt", "the head announces tensors that do not fit into the segment")
        self._check_generation(ready.generation)
        try:
            arena = pool.take(end, wait_s)
            tensors = {spec.name: arena.tensor(spec.shape, TORCH_DTYPES[spec.dtype]) for spec in specs}
        except LinkError:
            raise
        except (RuntimeError, OSError, OverflowError, MemoryError) as err:  # RuntimeError: more elements than torch can count
            raise codec.no_room(specs, err) from None
        sums = [codec.checksum(ready.head)]
        for tensor, start, size in zip(tensors.values(), starts, sizes, strict=True):
            sums.extend(_copy(tensor.reshape(-1).view(torch.uint8).numpy(), self._data[HEADER_BYTES + start :][:size]))
        self._check_generation(ready.generation)
        answer = Answer(head, tensors, arena)
        codec.check_tail(ready.tail, sums, answer.num_bytes)
        return answer

    def close(self) -> None:
        """Unmap."""
        del self._data, self._map  # as in Segment

    def _check_generation(self, expected: int) -> None:
        magic, generation = _HEADER.unpack_from(self._map)
        if (magic, generation) != (_MAGIC, expected):
            raise LinkError("corrupt", f"the segment holds generation {generation}, the answer is {expected}: it was written too early")


def _copy(target: np.ndarray, source: np.ndarray) -> Iterator[int]:
    """Copy piece by piece; yields the sum of every piece as it now is in `target`. Without the interpreter's lock while it copies."""
    for at in range(0, len(source), PIECE_BYTES):
        piece = target[at : at + PIECE_BYTES]
        np.copyto(piece, source[at : at + PIECE_BYTES])
        yield codec.checksum(piece.data)


def _seal_against_writing(fd: int) -> None:
    """Only mappings that are there already may write. Kernels before 5.1 cannot do it; clients of ours map for reading anyway."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)

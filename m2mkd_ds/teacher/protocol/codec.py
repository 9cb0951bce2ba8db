"""Answers as frames: a head, pieces of at most CHUNK_BYTES, a tail with checksums that is written last. No transport, no pickle.

    head    JSON: the answer's head, the size of pieces, and name, dtype and shape of every tensor in order
    pieces  the tensors' bytes one after the other; each is full, except the last one of a tensor, and none holds bytes of two tensors
    tail    JSON: xxh3-64 of the head and of every piece, and their total; a frame without it is not an answer

The head says how long every piece is, and the tail can be nothing but one string of bytes, so no two frames are read as the same answer.
The reader knows what it asked for and how much it may get: it refuses a head that says otherwise before it makes room for the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from m2mkd_ds.teacher.protocol.buffers import Arena, BufferPool, padded
from m2mkd_ds.teacher.protocol.packing import bounded_bad, told
from m2mkd_ds.teacher.protocol.wire import CHUNK_BYTES, TORCH_DTYPES, Answer, AnswerHead, LinkError, Name

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_HEAD_BYTES = 2 * 2**20
MAX_TENSORS = 1024
MAX_DIMS = 8
MAX_PIECES = 16 * 1024
"""Of one frame: 32 GiB at the usual size of pieces. A head that implies more is refused, because every piece costs a checksum to keep."""
MAX_LOST_TEXT = 4096

Size = Annotated[int, Field(ge=0, lt=2**40)]
Dtype = Literal["fp32", "bf16", "fp16", "int8", "uint8", "int64", "bool"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a frame."""

    name: Name
    dtype: Dtype
    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_DIMS)]

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _FrameHead:
    """What a head says. Pieces follow from it."""

    answer: AnswerHead
    chunk_bytes: Annotated[int, Field(ge=1, le=2**31)]
    tensors: Annotated[tuple[TensorSpec, ...], Field(max_length=MAX_TENSORS)]

    @property
    def num_pieces(self) -> int:
        """Of all tensors; one without elements has none."""
        return sum(-(-spec.num_bytes // self.chunk_bytes) for spec in self.tensors)


for _cls in (TensorSpec, _FrameHead):
    _cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]
_HEADS: list[TypeAdapter[_FrameHead]] = []

Accept = Callable[[AnswerHead, Sequence[TensorSpec]], None]
"""Sees a readable head before any room is made; raises LinkError for an answer that nobody asked for (answer_check.py)."""


@dataclass(frozen=True)
class Frame:
    """An encoded answer; `pieces` are views of the answer's own memory, which must not change before they are sent."""

    head: bytes
    pieces: tuple[memoryview, ...]
    num_bytes: int
    """Of all pieces."""

    @property
    def num_parts(self) -> int:
        """Head, pieces, tail."""
        return len(self.pieces) + 2

    def parts(self) -> Iterator[bytes | memoryview]:
        """What a transport sends, in order. A piece is summed when it is asked for: whoever sends it then finds it in the cache."""
        sums = [checksum(self.head)]
        yield self.head
        for piece in self.pieces:
            sums.append(checksum(piece))
            yield piece
        yield tail_bytes(sums, self.num_bytes)


def encode(answer: Answer, chunk_bytes: int = CHUNK_BYTES) -> Frame:
    """Frame of an answer; copies nothing. Raises ValueError as `head_of` does."""
    framed, packed = _head_of(answer, chunk_bytes)
    pieces = tuple(memoryview(room) for room in _rooms(framed, answer.tensors))  # type: ignore[arg-type]  # numpy arrays are buffers
    return Frame(packed, pieces, answer.num_bytes)


def head_of(answer: Answer, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """First part of a frame. Raises ValueError for a tensor that is not contiguous, not on the CPU, or of another dtype."""
    return _head_of(answer, chunk_bytes)[1]


def _head_of(answer: Answer, chunk_bytes: int) -> tuple[_FrameHead, bytes]:
    head = replace(answer.head, bad=bounded_bad(answer.head.bad), lost=answer.head.lost[:MAX_LOST_TEXT])
    specs = tuple(_spec_of(name, tensor) for name, tensor in answer.tensors.items())
    framed = _FrameHead(head, chunk_bytes, specs)
    if framed.num_pieces > MAX_PIECES or len(specs) > MAX_TENSORS:
        raise ValueError(
            f"an answer of {len(specs)} tensors in {framed.num_pieces} pieces of {chunk_bytes} bytes; at most {MAX_TENSORS} and "
            f"{MAX_PIECES} may travel: ask for fewer images at a time (micro_batch_size)"
        )
    return framed, _heads().dump_json(framed)


class FrameReader:
    """Takes the parts of one frame in order and gives the answer; raises LinkError(corrupt) at the first that cannot be right.

    `pool` lends the memory of the tensors; without one it is fresh. Memory that is not to be had is the fault of the head, too.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        pool: BufferPool | None = None,
        accept: Accept | None = None,
        wait_s: float = 60.0,
    ) -> None:
        self._max_bytes, self._pool, self._accept, self._wait_s = max_bytes, pool, accept, wait_s
        self._sums: list[int] = []
        self._head: AnswerHead | None = None
        self._tensors: dict[str, Tensor] = {}
        self._arena: Arena | None = None
        self._rooms: Iterator[np.ndarray[Any, Any]] = iter(())

    def head(self, part: bytes | memoryview) -> AnswerHead:
        """Read the head and make room for the tensors. Raises LinkError(deadline) when no buffer comes free for `wait_s`."""
        if self._sums:
            raise LinkError("corrupt", "a second head")
        framed = _parse(part, self._max_bytes)
        if self._accept is not None:
            self._accept(framed.answer, framed.tensors)
        self._sums.append(checksum(part))
        try:
            self._tensors = self._made(framed.tensors)
        except LinkError:
            raise
        except (RuntimeError, MemoryError, OSError, OverflowError) as err:  # torch has one kind for all that it cannot make
            raise no_room(framed.tensors, err) from None
        self._rooms = _rooms(framed, self._tensors)
        self._head = framed.answer
        return framed.answer

    def piece(self, part: bytes | memoryview) -> None:
        """Copy one piece into its place. The checksum is that of the copy, so `part` may lie in memory that others can write to."""
        room = next(self._rooms, None)
        if room is None or memoryview(part).nbytes != len(room):
            raise LinkError("corrupt", f"a piece of {memoryview(part).nbytes} bytes is not what the head announced next")
        # Neither numpy's copy nor xxh3 holds the GIL for pieces of this size; a memoryview's assignment would.
        np.copyto(room, np.frombuffer(part, dtype=np.uint8))
        self._sums.append(checksum(room.data))

    def tail(self, part: bytes | memoryview) -> Answer:
        """Compare all checksums and hand out the tensors, once."""
        if self._head is None or next(self._rooms, None) is not None:
            raise LinkError("corrupt", "the answer ended before all of its bytes had come")
        answer = Answer(self._head, self._tensors, self._arena)
        check_tail(part, self._sums, answer.num_bytes)
        self._head, self._tensors, self._arena, self._rooms = None, {}, None, iter(())
        return answer

    def _made(self, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
        if self._pool is None:
            return {spec.name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in specs}
        self._arena = self._pool.take(sum(padded(spec.num_bytes) for spec in specs), self._wait_s)
        return {spec.name: self._arena.tensor(spec.shape, TORCH_DTYPES[spec.dtype]) for spec in specs}


def no_room(specs: Sequence[TensorSpec], err: BaseException) -> LinkError:
    """What to raise where memory for the tensors of a head cannot be had."""
    total = sum(spec.num_bytes for spec in specs)
    why = (str(err).splitlines() or [type(err).__name__])[0][:200]
    return LinkError("corrupt", f"there is no room for the {total} bytes that the head announces ({why})")


def read(
    parts: Sequence[bytes | memoryview], *, max_bytes: int, pool: BufferPool | None = None, accept: Accept | None = None
) -> Answer:
    """The answer in the parts of one frame. Raises LinkError(corrupt)."""
    if len(parts) < 2:
        raise LinkError("corrupt", f"{len(parts)} parts; a frame has a head and a tail at least")
    reader = FrameReader(max_bytes=max_bytes, pool=pool, accept=accept)
    reader.head(parts[0])
    for part in parts[1:-1]:
        reader.piece(part)
    return reader.tail(parts[-1])


def parse_head(part: bytes | memoryview, max_bytes: int) -> tuple[AnswerHead, tuple[TensorSpec, ...]]:
    """Head and tensors, checked against the limits. Raises LinkError(corrupt)."""
    framed = _parse(part, max_bytes)
    return framed.answer, framed.tensors


def _parse(part: bytes | memoryview, max_bytes: int) -> _FrameHead:
    size = memoryview(part).nbytes
    if size > MAX_HEAD_BYTES:
        raise LinkError("corrupt", f"a head of {size} bytes; at most {MAX_HEAD_BYTES} are allowed")
    try:
        framed = _heads().validate_json(bytes(part), strict=True)
    except ValidationError as err:
        raise LinkError("corrupt", f"the head cannot be read ({told(err)})") from None
    if len({spec.name for spec in framed.tensors}) != len(framed.tensors):
        raise LinkError("corrupt", "the head names a tensor twice")
    total = sum(spec.num_bytes for spec in framed.tensors)
    if total > max_bytes:
        raise LinkError("corrupt", f"the head announces {total} bytes; at most {max_bytes} were agreed")
    if framed.num_pieces > MAX_PIECES:
        raise LinkError("corrupt", f"the head announces {framed.num_pieces} pieces; at most {MAX_PIECES} are read")
    return framed


def tail_bytes(sums: Sequence[int], num_bytes: int) -> bytes:
    """The only tail that vouches for exactly these sums and this many bytes."""
    return json.dumps({"sums": list(sums), "bytes": num_bytes, "complete": True}, separators=(",", ":")).encode()


def check_tail(part: bytes | memoryview, sums: Sequence[int], num_bytes: int) -> None:
    """Raises LinkError(corrupt) when the tail does not vouch for exactly these sums and this many bytes."""
    if part != tail_bytes(sums, num_bytes):
        raise LinkError("corrupt", "a checksum does not match: the bytes changed on the way")


def checksum(part: bytes | memoryview) -> int:
    """xxh3-64: about a tenth of the time of CRC-32; it finds damage, and is no signature."""
    return _xxh3()(part)


@cache
def _xxh3() -> Callable[[bytes | memoryview], int]:
    """Looked up once: an import statement costs as much as the sum of a small piece."""
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError as err:
        raise ImportError(f"a teacher server and its trainers need xxhash ({err}): pip install m2mkd_ds[teacher]") from err
    return xxh3_64_intdigest


def _spec_of(name: str, tensor: Tensor) -> TensorSpec:
    if not 0 < len(name) <= 256 or tensor.dtype not in _DTYPE_NAMES or tensor.ndim > MAX_DIMS:
        raise ValueError(f"tensor {name[:256]!r}: {tensor.dtype} {list(tensor.shape)} cannot travel; allowed are {', '.join(TORCH_DTYPES)}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        where = f"lies on {tensor.device}" if tensor.device.type != "cpu" else f"is not contiguous (strides {tensor.stride()})"
        raise ValueError(f"tensor {name!r} {where}: give a contiguous one on the CPU, its bytes are sent as they are")
    dtype: Dtype = _DTYPE_NAMES[tensor.dtype]  # type: ignore[assignment]  # the keys of TORCH_DTYPES are Dtype
    return TensorSpec(name, dtype, tuple(tensor.shape))


def _rooms(framed: _FrameHead, tensors: dict[str, Tensor]) -> Iterator[np.ndarray[Any, Any]]:
    """The memory of every piece in order, uint8."""
    for spec in framed.tensors:
        if spec.num_bytes:
            bytes_N = tensors[spec.name].detach().reshape(-1).view(torch.uint8).numpy()
            yield from (bytes_N[at : at + framed.chunk_bytes] for at in range(0, len(bytes_N), framed.chunk_bytes))


def _heads() -> TypeAdapter[_FrameHead]:
    """Made at its first use: making it takes milliseconds, and importing this file should not."""
    if not _HEADS:
        _HEADS.append(TypeAdapter(_FrameHead))
    return _HEADS[0]

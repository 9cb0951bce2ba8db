"""Answers as frames: a head, pieces of at most CHUNK_BYTES, a tail with checksums that is written last. No transport, no pickle.

    head    JSON: the answer's head, and name, dtype and shape of every tensor in order
    pieces  the tensors' bytes one after the other; none holds bytes of two tensors
    tail    JSON: xxh3-64 of the head and of every piece, and their total; a frame without it is not an answer

The reader knows what it asked for and how much it may get: it refuses a head that says otherwise before it makes room for the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.teacher.wire import CHUNK_BYTES, MAX_MESSAGE_BYTES, TORCH_DTYPES, Answer, AnswerHead, LinkError, pack, unpack

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_TENSORS = 1024
MAX_DIMS = 8


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a frame."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Frame:
    """An encoded answer; `pieces` are views of the answer's own memory, which must not change before they are sent."""

    head: bytes
    pieces: tuple[memoryview, ...]
    tail: bytes

    def parts(self) -> Iterator[bytes | memoryview]:
        """Head, pieces, tail: what a transport sends, in order."""
        yield self.head
        yield from self.pieces
        yield self.tail


def encode(answer: Answer, chunk_bytes: int = CHUNK_BYTES) -> Frame:
    """Frame of an answer whose tensors are contiguous and on the CPU."""
    head = head_of(answer)
    pieces = tuple(
        view[at : at + chunk_bytes] for t in answer.tensors.values() for view in (_bytes_of(t),) for at in range(0, len(view), chunk_bytes)
    )
    return Frame(head, pieces, tail_of([checksum(head), *(checksum(piece) for piece in pieces)], answer.num_bytes))


def head_of(answer: Answer) -> bytes:
    """First part of a frame. Raises KeyError for a dtype that does not travel."""
    specs = [[name, _DTYPE_NAMES[t.dtype], list(t.shape)] for name, t in answer.tensors.items()]
    return json.dumps({"answer": json.loads(pack(answer.head)), "tensors": specs}, separators=(",", ":")).encode()


def tail_of(sums: Sequence[int], num_bytes: int) -> bytes:
    """Last part of a frame: `sums` of the head and of every piece, `num_bytes` of all tensors."""
    return json.dumps({"sums": list(sums), "bytes": num_bytes, "complete": True}, separators=(",", ":")).encode()


class FrameReader:
    """Takes the parts of one frame in order and gives the answer; raises LinkError(corrupt) at the first that cannot be right."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sums: list[int] = []
        self._head: AnswerHead | None = None
        self._tensors: dict[str, Tensor] = {}
        self._open: list[memoryview] = []
        """Room of the tensors that are not full yet, the next one last."""

    def head(self, part: bytes | memoryview) -> AnswerHead:
        """Read the head and make room for the tensors."""
        self._sums.append(checksum(part))
        self._head, specs = parse_head(bytes(part), self._max_bytes)
        self._tensors = {spec.name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in specs}
        self._open = [view for tensor in reversed(self._tensors.values()) if len(view := _bytes_of(tensor))]
        return self._head

    def piece(self, part: bytes | memoryview) -> None:
        """Copy one piece into its place."""
        size = len(part)
        if not self._open or size > len(self._open[-1]):
            raise LinkError("corrupt", "more bytes than the head announced")
        self._sums.append(checksum(part))
        room = self._open.pop()
        room[:size] = part
        if size < len(room):
            self._open.append(room[size:])

    def tail(self, part: bytes | memoryview) -> Answer:
        """Compare all checksums and hand out the tensors."""
        if self._head is None or self._open:
            raise LinkError("corrupt", "the answer ended before all of its bytes had come")
        answer = Answer(self._head, self._tensors)
        check_tail(bytes(part), self._sums, answer.num_bytes)
        return answer


def read(parts: Sequence[bytes | memoryview[int]], *, max_bytes: int) -> Answer:
    """The answer in the parts of one frame."""
    reader = FrameReader(max_bytes=max_bytes)
    reader.head(parts[0])
    for part in parts[1:-1]:
        reader.piece(part)
    return reader.tail(parts[-1])


def parse_head(part: bytes, max_bytes: int) -> tuple[AnswerHead, list[TensorSpec]]:
    """Head and tensors, checked against the limits. Raises LinkError(corrupt)."""
    if len(part) > 2 * MAX_MESSAGE_BYTES:
        raise LinkError("corrupt", f"a head of {len(part)} bytes")
    try:
        tree: Any = json.loads(part)
        specs = [TensorSpec(str(name), str(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in tree["tensors"]]
        head = unpack(AnswerHead, json.dumps(tree["answer"]).encode())
    except (ValueError, KeyError, TypeError, RecursionError, RuntimeError) as err:
        raise LinkError("corrupt", f"the head cannot be read ({err})") from None
    possible = all(len(s.shape) <= MAX_DIMS and min(s.shape, default=0) >= 0 and s.dtype in TORCH_DTYPES for s in specs)
    if len(specs) > MAX_TENSORS or not possible:
        raise LinkError("corrupt", "the head announces tensors that cannot be")
    total = sum(spec.num_bytes for spec in specs)
    if total > max_bytes:
        raise LinkError("corrupt", f"the head announces {total} bytes; at most {max_bytes} were agreed")
    return head, specs


def check_tail(part: bytes, sums: Sequence[int], num_bytes: int) -> None:
    """Raises LinkError(corrupt) when the tail does not vouch for exactly these sums and this many bytes."""
    try:
        tail = json.loads(part)
        good = tail == {"sums": list(sums), "bytes": num_bytes, "complete": True}
    except (ValueError, RecursionError) as err:
        raise LinkError("corrupt", f"the tail cannot be read ({err})") from None
    if not good:
        raise LinkError("corrupt", "a checksum does not match: the bytes changed on the way")


def checksum(part: bytes | memoryview) -> int:
    """xxh3-64: about a tenth of the time of CRC-32; it finds damage, and is no signature."""
    return _xxh3()(part)


@cache
def _xxh3() -> Callable[[bytes | memoryview], int]:
    """Looked up once: an import statement costs as much as the sum of a small piece."""
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers

"""What passes through the Unix socket between a trainer and the teacher server of its host: framed messages, no tensors, no pickle.

    frame   4 bytes length of the body (big endian), 1 byte kind, body
    asks    H Hello   G Golden   B GetBatch   S Status   A Ack (the answer has been copied; its segment may be written again)
    tells   W Welcome   T Status   R Ready (an answer lies in the segment)   E Refusal

A socket carries one request at a time, and its answers lie in one segment (segment.py): a *lane*. A client with several requests under
way has as many lanes; late answers of an abandoned request end with their lane.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from m2mkd_ds.teacher.protocol.wire import MAX_MESSAGE_BYTES, ErrorCode, FeedError

HELLO, GOLDEN, GET, STATUS, ACK = b"H", b"G", b"B", b"S", b"A"
WELCOME, STATE, READY, REFUSED = b"W", b"T", b"R", b"E"

MAX_READY_BYTES = 4 * MAX_MESSAGE_BYTES
"""An answer's head and tail in one body; tensors and their sums at 512 KiB each, that is a head of 128 KiB and room for 4 GiB."""
_HEADER = struct.Struct(">Ic")
_READY = struct.Struct(">QQI")
_ACK = struct.Struct(">Q")


class FrameError(Exception):
    """What came cannot be a frame."""


@dataclass(frozen=True)
class Ready:
    """An answer lies in the segment: its generation, the segment's size with the header page, and the codec's head and tail."""

    generation: int
    segment_bytes: int
    head: bytes
    tail: bytes

    def pack(self) -> bytes:
        """As a body. Raises ValueError past MAX_READY_BYTES."""
        body = _READY.pack(self.generation, self.segment_bytes, len(self.head)) + self.head + self.tail
        if len(body) > MAX_READY_BYTES:
            raise ValueError(f"head and tail have {len(body)} bytes; at most {MAX_READY_BYTES} are allowed: ask for fewer images")
        return body

    @classmethod
    def unpack(cls, body: bytes) -> Ready:
        """Raises FrameError."""
        if len(body) < _READY.size:
            raise FrameError(f"an answer of {len(body)} bytes")
        generation, segment_bytes, head_bytes = _READY.unpack_from(body)
        rest = body[_READY.size :]
        if head_bytes > len(rest):
            raise FrameError("a head longer than its message")
        return cls(generation, segment_bytes, rest[:head_bytes], rest[head_bytes:])


def pack_ack(generation: int) -> bytes:
    """The body of an Ack."""
    return _ACK.pack(generation)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A FeedError on its way."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    code: ErrorCode
    message: Annotated[str, Field(max_length=4096)]
    retry_after_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    slots: Annotated[tuple[int, ...], Field(max_length=1024)] = ()
    endpoints: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(max_length=64)] = ()


_REFUSAL = TypeAdapter(Refusal)


def pack_error(error: FeedError) -> bytes:
    """A refusal as a body; what is too long is cut."""
    named = {"retry_after_s": min(error.retry_after_s, 3600.0), "slots": error.slots[:1024], "endpoints": error.endpoints[:64]}
    return json.dumps({"code": error.code, "message": str(error)[:4096], **named}).encode()


def unpack_error(body: bytes) -> FeedError:
    """The refusal in a body. Raises FrameError."""
    try:
        refusal = _REFUSAL.validate_json(body)
    except ValidationError as err:
        raise FrameError(f"a refusal that cannot be read ({err.errors(include_input=False, include_url=False)[0]['msg']})") from None
    return FeedError(refusal.code, refusal.message, retry_after_s=refusal.retry_after_s, slots=refusal.slots, endpoints=refusal.endpoints)


def send(sock: socket.socket, kind: bytes, body: bytes, deadline: float, fds: tuple[int, ...] = ()) -> None:
    """Send one frame, and descriptors with its first bytes, until `deadline` (time.monotonic). Raises OSError, TimeoutError among them."""
    data = memoryview(_HEADER.pack(len(body), kind) + body)
    _limit(sock, deadline)
    sent = socket.send_fds(sock, [data], list(fds)) if fds else sock.send(data)
    while sent < len(data):
        _limit(sock, deadline)
        sent += sock.send(data[sent:])


def receive(sock: socket.socket, deadline: float, *, most: int, rest_s: float, max_fds: int = 0) -> tuple[bytes, bytes, list[int]] | None:
    """The next frame: kind, body, descriptors that came with it; None when the other side has closed between two frames.

    A frame must be whole before `deadline` (time.monotonic) and `rest_s` after its first byte. Raises FrameError for a body of more than
    `most` bytes or cut short, OSError (TimeoutError among them).
    """
    _limit(sock, deadline)
    # Descriptors belong to the first byte of a frame; the kernel drops those that come with any other, or that nobody asks for.
    header, fds, _, _ = socket.recv_fds(sock, _HEADER.size, max_fds, socket.MSG_CMSG_CLOEXEC)
    try:
        if not header:
            return None
        deadline = min(deadline, time.monotonic() + rest_s)
        header += _exactly(sock, _HEADER.size - len(header), deadline)
        size, kind = _HEADER.unpack(header)
        if size > most:
            raise FrameError(f"a message of {size} bytes; at most {most} are allowed")
        return kind, _exactly(sock, size, deadline), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    """The next `size` bytes; room grows with what has come, not with what was announced."""
    parts = []
    while size:
        _limit(sock, deadline)
        part = sock.recv(min(size, 65536))
        if not part:
            raise FrameError("a message that was cut short")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _limit(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    sock.settimeout(min(left, 86400.0))

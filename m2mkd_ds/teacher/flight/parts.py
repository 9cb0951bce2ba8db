"""How a frame's parts and a server's refusals stand in Flight's stream: one record batch a part, one uint8 column, no copy.

A refusal comes where the first part or an action's result would: Flight's own error details travel in HTTP/2 trailers, whose size gRPC
limits to a few KB, less than the slots of a poisoned batch need.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from m2mkd_ds.teacher.protocol.wire import MAX_MESSAGE_BYTES, ErrorCode, FeedError, LinkError, Position

PIECE_BYTES = 2**20
"""Of a frame that goes over Flight: gRPC copies a part once more, and one of this size is still in the processor's cache then."""
MAX_PART_BYTES = 4 * 2**20
"""Largest record batch that a client takes; gRPC compares its announced size before it makes room."""
MAX_TICKET_BYTES = MAX_MESSAGE_BYTES + 16
GET, GOLDEN = b"get ", b"golden "
"""A ticket is one of these and the packed message."""
HELLO, STATUS = "hello", "status"
"""Actions; body and result are packed messages."""
TOKEN_HEADER = "authorization"
TOKEN_PREFIX = b"Bearer "
_REFUSED = b'{"refused":'


class _Refusal(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    code: ErrorCode
    message: str = Field(max_length=16 * 1024)
    retry_after_s: float = Field(ge=0, le=86_400)
    slots: tuple[Position, ...] = Field(max_length=2048)
    endpoints: tuple[str, ...] = Field(max_length=64)


def pack_refusal(err: FeedError) -> bytes:
    """As JSON that cannot be taken for a message or a head; cut to what a reader accepts."""
    refused = {
        "code": err.code, "message": str(err)[:4096], "retry_after_s": min(max(err.retry_after_s, 0.0), 86_400.0),
        "slots": err.slots[:2048], "endpoints": [endpoint[:256] for endpoint in err.endpoints[:64]],
    }  # fmt: skip
    return _REFUSED + json.dumps(refused).encode() + b"}"


def raise_refusal(part: bytes | memoryview) -> None:
    """Raises the FeedError in `part` if it is a refusal, LinkError(corrupt) if it is a damaged one."""
    if bytes(part[: len(_REFUSED)]) != _REFUSED:
        return
    if len(part) > 4 * MAX_MESSAGE_BYTES:
        raise LinkError("corrupt", f"a refusal of {len(part)} bytes")
    try:
        refused = _Refusal.model_validate(json.loads(bytes(part))["refused"])
    except (ValueError, ValidationError, KeyError, TypeError, RecursionError):
        raise LinkError("corrupt", f"a refusal that cannot be read; its code must be one of {', '.join(get_args(ErrorCode))}") from None
    raise FeedError(refused.code, refused.message, retry_after_s=refused.retry_after_s, slots=refused.slots, endpoints=refused.endpoints)


@cache
def schema() -> Any:
    """Of every stream."""
    import pyarrow as pa

    return pa.schema([pa.field("part", pa.uint8(), nullable=False)])


def to_batch(part: bytes | memoryview) -> Any:
    """A record batch over the part's own memory, which must not change before it is sent."""
    import pyarrow as pa

    column = pa.Array.from_buffers(pa.uint8(), len(part), [None, pa.py_buffer(part)])
    return pa.RecordBatch.from_arrays([column], schema=schema())


def from_batch(batch: Any) -> memoryview:
    """The part in a record batch, without a copy; lives as long as the view."""
    column = batch.column(0)
    view = memoryview(column.buffers()[1]).cast("B")
    return view[column.offset : column.offset + len(column)]


def import_flight() -> Any:
    """pyarrow.flight. Raises ImportError with the line that installs it."""
    # gRPC writes lines of its own to stderr, one a failed handshake; what they say is told in sentences of ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from pyarrow import flight
    except ImportError as err:
        raise ImportError(f"teacher servers over a network need pyarrow >= 26 with Flight ({err}): pip install m2mkd_ds[teacher]") from err
    return flight

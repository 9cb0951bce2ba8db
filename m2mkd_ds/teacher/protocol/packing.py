"""Messages of wire.py as bytes: JSON, checked against their types before anything is done with them, and of bounded size.

Also what two versions of us can say to each other (`negotiate`), and texts of strangers made fit to be shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.teacher.protocol.wire import (
    MAX_BAD,
    MAX_BAD_NAME,
    MAX_BAD_TEXT,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
    OLDEST_PROTOCOL,
    PROTOCOL_VERSION,
    AnswerHead,
    Count,
    FeedError,
    GetBatch,
    Golden,
    Hello,
    Status,
    Welcome,
)

_Message = TypeVar("_Message", Hello, Welcome, GetBatch, Golden, Status, AnswerHead)
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def pack(message: Any) -> bytes:
    """A message as JSON. Raises ValueError past MAX_MESSAGE_BYTES."""
    packed = _adapter(type(message)).dump_json(message)
    if len(packed) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message {type(message).__name__} of {len(packed)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    return packed


def unpack(kind: type[_Message], packed: bytes) -> _Message:
    """The message in `packed`. Raises FeedError: bad_request naming what is wrong with it, mismatch for a Hello of another protocol."""
    if len(packed) > MAX_MESSAGE_BYTES:
        raise FeedError("bad_request", f"{kind.__name__}: {len(packed)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    if kind is Hello:
        packed = _hello_of_our_time(packed)
    try:
        message: _Message = _adapter(kind).validate_json(packed, strict=True)
    except ValidationError as err:
        raise FeedError("bad_request", f"{kind.__name__}: {told(err)}") from None
    return message


def unpack_name(packed: bytes) -> str:
    """The client that asks for a Status; empty: one that did not say. Raises FeedError(bad_request)."""
    try:
        name = packed.decode()
    except UnicodeDecodeError:
        raise FeedError("bad_request", "status: the client's name is no text") from None
    if len(name) > MAX_NAME_CHARS:
        raise FeedError("bad_request", f"status: a client's name of {len(name)} characters; at most {MAX_NAME_CHARS} are allowed")
    return name


def told(err: ValidationError) -> str:
    """What is wrong, in at most a few hundred printable characters: the names of fields may be a stranger's."""
    faults = (f"{'.'.join(map(str, e['loc']))[:80]}: {e['msg']}" for e in err.errors(include_input=False, include_url=False)[:4])
    return ascii("; ".join(faults))[1:-1][:400]


def negotiate(oldest: int, newest: int, *, ours: tuple[int, int] = (OLDEST_PROTOCOL, PROTOCOL_VERSION)) -> int:
    """The newest protocol that a trainer (`oldest` to `newest`) and a server (`ours`) both speak. Raises FeedError(mismatch)."""
    if max(oldest, ours[0]) > (both := min(newest, ours[1])):
        older = "trainer" if newest < ours[0] else "server"
        raise FeedError(
            "mismatch",
            f"protocol: the trainer speaks {oldest} to {newest}, the server {ours[0]} to {ours[1]}; install a newer m2mkd_ds for the "
            f"{older}, or the same version on both sides",
        )
    return both


@dataclass(frozen=True, kw_only=True)
class _Range:
    """The part of a Hello that every protocol has."""

    oldest_protocol: Count
    newest_protocol: Count


def _hello_of_our_time(packed: bytes) -> bytes:
    """A Hello without the fields that only newer protocols have. Raises FeedError(mismatch) when it speaks none of ours.

    A newer trainer that still speaks our protocol adds fields that we do not know, and can do without an answer to them.
    """
    try:
        spoken = TypeAdapter(_Range).validate_json(packed, strict=True)
    except ValidationError:
        return packed  # not a Hello at all: checked as a whole, which says what is wrong
    negotiate(spoken.oldest_protocol, spoken.newest_protocol)
    if spoken.newest_protocol <= PROTOCOL_VERSION:
        return packed
    known = {f.name for f in fields(Hello)}
    return json.dumps({name: value for name, value in json.loads(packed).items() if name in known}).encode()


def bounded_bad(bad: Sequence[BadSample]) -> tuple[BadSample, ...]:
    """`bad` within what an answer may hold: long texts are cut; of more than MAX_BAD samples the last one tells how many are left out."""
    kept = [_cut(sample) for sample in bad[:MAX_BAD]]
    if len(bad) > MAX_BAD:
        left_out = f"and {len(bad) - MAX_BAD} more damaged samples in this micro-batch; "
        kept[-1] = _cut(replace(kept[-1], message=left_out + kept[-1].message))
    return tuple(kept)


def _cut(sample: BadSample) -> BadSample:
    return replace(sample, shard=sample.shard[:MAX_BAD_NAME], key=sample.key[:MAX_BAD_NAME], message=sample.message[:MAX_BAD_TEXT])


def _adapter(kind: type) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]

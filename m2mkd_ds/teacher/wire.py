"""What trainers and teacher servers say to each other, free of any transport: messages, limits, errors.

    Hello -> Welcome       who asks for what, and whether both sides mean the same models, images and order
    Golden -> Answer       outputs for a fixed synthetic image, to be compared before anything is trained on
    GetBatch -> Answer     one micro-batch, named by its first stream position
    Status                 whether the server is ready, drains, and how busy it is

Messages are JSON and checked against these types before anything is done with them; tensors travel beside them (codec.py). A server
holds no position of anybody: every GetBatch says all that is needed to answer it, so any server may answer, and be killed, at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.plan import BatchLayout

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024
"""Largest message, of either side; tensors do not count."""
CHUNK_BYTES = 2 * 1024 * 1024
"""Tensors travel in pieces of this size: a message of a whole batch would be bound by page faults, one of a few MB is not."""

Payload = Literal["hidden", "image", "logits"]
"""hidden: h_i, targets and logits. image: what a loader's worker makes, and logits; the trainer runs the prefix. logits: these alone."""
WireDtype = Literal["fp32", "bf16", "fp16", "int8"]
"""Of hidden states and of float images on the way; logits and targets always travel as they are."""
ErrorCode = Literal["retry_later", "draining", "mismatch", "bad_request", "unauthenticated", "poisoned", "internal"]
"""retry_later: too much asked for at once. draining: the server is about to leave. mismatch: another model, data, order or instance than
the caller means. bad_request: cannot be a message of ours. poisoned: the teacher's output is not finite. internal: a bug of the server."""
LinkFault = Literal["unreachable", "deadline", "corrupt", "closed"]

Name = Annotated[str, Field(max_length=256)]
Digest = Annotated[str, Field(max_length=128)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Index = Annotated[int, Field(ge=0, le=1_000_000)]
Position = Annotated[int, Field(ge=0, lt=2**62)]
Pairs = Annotated[tuple[Index, ...], Field(min_length=1, max_length=256)]


class FeedError(RuntimeError):
    """A server's refusal: `code`, and where it helps how long to wait, which slots are concerned, and whom to ask instead."""

    def __init__(
        self, code: ErrorCode, message: str, *, retry_after_s: float = 0.0, slots: tuple[int, ...] = (), endpoints: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.code, self.retry_after_s, self.slots, self.endpoints = code, retry_after_s, slots, endpoints


class LinkError(RuntimeError):
    """The way to a server failed: nobody there, no answer within the deadline, a damaged or impossible answer, or closed by us."""

    def __init__(self, fault: LinkFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A trainer's first words to a server."""

    oldest_protocol: Count
    newest_protocol: Count
    client: Name
    """Random name of the asking process, for quotas and logs."""
    rank: Index
    layout: BatchLayout
    pairs: Pairs
    payload: Payload
    wire_dtype: WireDtype
    with_teacher: bool
    """Whether teacher logits will be asked for."""
    fingerprints: Annotated[dict[Name, Digest], Field(max_length=1024)]
    """What must be equal on both sides, by field (handshake.py)."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server grants one client."""

    max_count: Count
    """Images of a micro-batch."""
    max_answer_bytes: Annotated[int, Field(ge=1, le=2**40)]
    """Tensors of one answer; a client refuses more before it has room for it."""
    max_in_flight: Count
    """Requests of one client at a time."""
    heartbeat_s: Annotated[float, Field(gt=0, le=3600)]
    """A client that is silent for longer than a few of these is forgotten."""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """A server's answer to Hello: it serves exactly this stream."""

    protocol: Count
    instance: Digest
    """Random name of this server process: after a restart, everybody says Hello again."""
    plan: Digest
    """Of everything that pixels and order follow from, layout included; every answer repeats it."""
    fingerprints: Annotated[dict[Name, Digest], Field(max_length=1024)]
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class GetBatch:
    """One micro-batch of one rank. `attempt` tells answers of an abandoned try from those of the present one."""

    instance: Digest
    plan: Digest
    client: Name
    layout: BatchLayout
    start: Position
    """First stream position; the count is the layout's micro-batch."""
    pairs: Pairs
    payload: Payload
    wire_dtype: WireDtype
    with_teacher: bool
    attempt: Index


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Asks for the outputs for `handshake.golden_images`: prefix, module and logits of every pair, in full precision."""

    instance: Digest
    pairs: Pairs


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a server is."""

    instance: Digest
    ready: bool
    draining: bool
    in_flight: Annotated[int, Field(ge=0)]
    clients: Annotated[int, Field(ge=0)]
    endpoints: Annotated[tuple[Name, ...], Field(max_length=1024)] = ()
    """Other servers that the operator named."""


@dataclass(frozen=True, kw_only=True)
class AnswerHead:
    """What stands before the tensors of an answer: it repeats the question, so that nothing else can be taken for its answer."""

    instance: Digest
    plan: Digest
    start: Position
    pairs: Pairs
    payload: Payload
    wire_dtype: WireDtype
    with_teacher: bool
    attempt: Index
    step: Position = 0
    micro_step: Index = 0
    fallbacks: Annotated[int, Field(ge=0)] = 0
    erase_pixels: Annotated[int, Field(ge=0, lt=2**40)] = 0
    bad: Annotated[tuple[BadSample, ...], Field(max_length=256)] = ()
    lost: Annotated[str, Field(max_length=4096)] = ""
    """As `TeacherBatch.lost`: then the tensors are zeros."""

    def answers(self, request: GetBatch) -> bool:
        """Whether this is the answer to that very request and attempt."""
        return all(getattr(self, f.name) == getattr(request, f.name) for f in fields(request) if f.name not in ("client", "layout"))


@dataclass(frozen=True)
class Answer:
    """Tensors by name, and what they are the answer to.

    hidden.I [B, L, D] and logits.I [B, V] of pair I, targets [B, V] fp32; pair 0's input and payload=image travel as a loader's worker
    made them: image.pixels, image.labels, image.flip, image.erase, image.shares, image.boxes (data/batch.py). With wire_dtype=int8,
    hidden.I.scale lies beside int8 hidden.I. For Golden also module.I, the output of T_I.
    """

    head: AnswerHead
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, "uint8": torch.uint8,
    "int64": torch.int64, "bool": torch.bool,
}  # fmt: skip
"""Every dtype that travels, by its name on the wire."""

_Message = TypeVar("_Message", Hello, Welcome, GetBatch, Golden, Status, AnswerHead)
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
for _cls in (Limits, Hello, Welcome, GetBatch, Golden, Status, AnswerHead):
    _cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[union-attr]


def pack(message: Any) -> bytes:
    """A message as JSON. Raises ValueError past MAX_MESSAGE_BYTES."""
    packed = _adapter(type(message)).dump_json(message)
    if len(packed) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message {type(message).__name__} of {len(packed)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    return packed


def unpack(kind: type[_Message], packed: bytes) -> _Message:
    """The message in `packed`. Raises FeedError(bad_request) naming what is wrong with it."""
    if len(packed) > MAX_MESSAGE_BYTES:
        raise FeedError("bad_request", f"{kind.__name__}: {len(packed)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        message: _Message = _adapter(kind).validate_json(packed)
    except ValidationError as err:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors(include_input=False, include_url=False)[:4])
        raise FeedError("bad_request", f"{kind.__name__}: {told}") from None
    return message


def _adapter(kind: type) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


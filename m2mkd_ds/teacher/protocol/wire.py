"""What trainers and teacher servers say to each other, free of any transport: messages, limits, errors.

    Hello -> Welcome       who asks for what, and whether both sides mean the same models, images and order
    Golden -> Answer       outputs for a fixed synthetic image, to be compared before anything is trained on
    GetBatch -> Answer     one micro-batch, named by its first stream position
    Status                 whether the server is ready, drains, and how busy it is

Messages are JSON and checked against these types before anything is done with them (packing.py); tensors travel beside them
(codec.py). A server holds no position of anybody: every GetBatch says all that is needed to answer it, so any server may answer, and
be killed, at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, Protocol

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.plan import BatchLayout

OLDEST_PROTOCOL, PROTOCOL_VERSION = 2, 2
"""What this installation speaks, both included."""
MAX_MESSAGE_BYTES = 64 * 1024
"""Largest message, of either side; tensors do not count."""
CHUNK_BYTES = 2 * 1024 * 1024
"""Tensors travel in pieces of this size: a message of a whole batch would be bound by page faults, one of a few MB is not."""

Payload = Literal["hidden", "image", "logits", "evaluation"]
"""hidden: h_i, targets and logits. image: what a loader's worker makes, and logits; the trainer runs the prefix. logits: these alone.
evaluation: validation images, in batches of their own layout (evaluation_images.py)."""
MAX_BAD, MAX_BAD_NAME, MAX_BAD_TEXT = 256, 256, 1024
"""Damaged samples that one answer may tell of, and characters of their names and messages."""
INT8_GROUP = 128
"""With wire_dtype=int8, so many neighbouring numbers of a token share a scale."""
WireDtype = Literal["fp32", "bf16", "fp16", "int8"]
"""Of hidden states and of float images on the way; logits and targets always travel as they are."""
ErrorCode = Literal["retry_later", "draining", "mismatch", "bad_request", "unauthenticated", "poisoned", "data", "internal"]
"""retry_later: too much asked for at once. draining: the server is about to leave. mismatch: another model, data, order or instance than
the caller means. bad_request: cannot be a message of ours. poisoned: the teacher's output is not finite. data: a shard or sample of the
server's cannot be read. internal: a bug of the server."""
LinkFault = Literal["unreachable", "untrusted", "deadline", "corrupt", "closed"]

MAX_NAME_CHARS = 256
Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Digest = Annotated[str, Field(max_length=128)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Index = Annotated[int, Field(ge=0, le=1_000_000)]
Position = Annotated[int, Field(ge=0, lt=2**62)]


def _distinct(pairs: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(pairs)) != len(pairs):
        raise ValueError("a pair is named twice")
    return pairs


def _bounded_layout(layout: BatchLayout) -> BatchLayout:
    if max(layout.micro_batch_size, layout.accumulation, layout.world) > 1_000_000 or abs(layout.origin) >= 2**62:
        raise ValueError("micro_batch_size, accumulation and world may be 1000000 at most, origin within 2^62")
    return layout


def _bounded_bad(bad: tuple[BadSample, ...]) -> tuple[BadSample, ...]:
    for sample in bad:
        if max(len(sample.shard), len(sample.key)) > MAX_BAD_NAME or len(sample.message) > MAX_BAD_TEXT:
            raise ValueError(f"shard and key may have {MAX_BAD_NAME} characters at most, the message {MAX_BAD_TEXT}")
        if max(abs(sample.sample), abs(sample.position), abs(sample.substitute)) >= 2**62:
            raise ValueError("sample, position and substitute must lie within 2^62")
    return bad


Pairs = Annotated[tuple[Index, ...], Field(min_length=1, max_length=256), AfterValidator(_distinct)]
Layout = Annotated[BatchLayout, AfterValidator(_bounded_layout)]


class FeedError(RuntimeError):
    """A server's refusal: `code`, and where it helps how long to wait, which slots are concerned, and whom to ask instead."""

    def __init__(
        self, code: ErrorCode, message: str, *, retry_after_s: float = 0.0, slots: tuple[int, ...] = (), endpoints: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.code, self.retry_after_s, self.slots, self.endpoints = code, retry_after_s, slots, endpoints


class LinkError(RuntimeError):
    """The way to a server failed: nobody there, no answer within the deadline, a damaged or impossible answer, or closed by us.

    untrusted: somebody is there, and certificates or TLS of the two sides do not fit; waiting does not mend that.
    """

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
    layout: Layout
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
    layout: Layout
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
    bad: Annotated[tuple[BadSample, ...], Field(max_length=MAX_BAD), AfterValidator(_bounded_bad)] = ()
    lost: Annotated[str, Field(max_length=4096)] = ""
    """As `TeacherBatch.lost`: then the tensors are zeros."""

    def answers(self, request: GetBatch) -> bool:
        """Whether this is the answer to that very request and attempt."""
        return all(getattr(self, f.name) == getattr(request, f.name) for f in fields(request) if f.name not in ("client", "layout"))


class Event(Protocol):
    """A point in a device's queue; torch.cuda.Event is one."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...


class Lease(Protocol):
    """Memory that an answer's tensors lie in, borrowed from a pool (buffers.py)."""

    def end(self, after: Event | None) -> None:
        """The borrower is done with it, except for what the device does before `after`."""
        ...


@dataclass(frozen=True)
class Answer:
    """Tensors by name, and what they are the answer to.

    hidden.I [B, L, D] and logits.I [B, V] of pair I, targets [B, V] fp32; pair 0's input and payload=image travel as a loader's worker
    made them: image.pixels, image.labels, image.flip, image.erase, image.shares, image.boxes (data/batch.py). With wire_dtype=int8,
    hidden.I.scale [B, L, ceil(D / INT8_GROUP)] fp32 lies beside int8 hidden.I. For Golden also module.I, the output of T_I.
    """

    head: AnswerHead
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """Who lent the tensors' memory; None: it is the tensors' own."""

    def release(self, after: Event | None = None) -> None:
        """Let go of the tensors: from now on there are none here, and their memory may receive other answers.

        Not before the last other holder of such a tensor has let go of it, too, so this never takes anything away from anybody. With
        copies to a device that are only queued (non_blocking=True), give an event recorded behind them.
        """
        self.tensors.clear()
        if self.lease is not None:
            self.lease.end(after)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


TORCH_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, "uint8": torch.uint8,
    "int64": torch.int64, "bool": torch.bool,
}  # fmt: skip
"""Every dtype that travels, by its name on the wire."""

for _cls in (Limits, Hello, Welcome, GetBatch, Golden, Status, AnswerHead):
    _cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[union-attr]

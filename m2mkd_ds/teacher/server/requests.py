"""What a request may ask for, checked before any work is done: by types in wire.py, against this server here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.wire import FeedError, GetBatch, Limits, Payload, WireDtype

MAX_RANKS = 1_000_000
"""Of a layout, and micro-steps of a step."""
MAX_POSITION = 2**62
"""Positions fit into int64 with room to count on."""


class StreamRequest(Protocol):
    """What Hello and GetBatch have in common."""

    @property
    def layout(self) -> BatchLayout: ...
    @property
    def pairs(self) -> tuple[int, ...]: ...
    @property
    def payload(self) -> Payload: ...
    @property
    def wire_dtype(self) -> WireDtype: ...
    @property
    def with_teacher(self) -> bool: ...


def check_stream(request: StreamRequest, served: Collection[int], limits: Limits) -> None:
    """Raises FeedError(bad_request) naming the field, what was given and what is allowed."""
    _check_layout(request.layout, limits)
    if request.payload == "evaluation":
        if request.with_teacher:
            raise FeedError("bad_request", "with_teacher: payload=evaluation gives images alone, of no pair")
        return
    absent = sorted(set(request.pairs) - set(served))
    if absent or len(set(request.pairs)) < len(request.pairs) or not request.pairs:
        what = f"pair {absent[0]} is not served" if absent else "each pair once, and at least one"
        raise FeedError("bad_request", f"pairs: {_short(request.pairs)}: {what}; this server has {sorted(served)}")
    if request.payload == "logits" and not request.with_teacher:
        raise FeedError("bad_request", "with_teacher: payload=logits without teacher logits asks for nothing")
    if request.payload != "hidden" and request.wire_dtype == "int8":
        raise FeedError("bad_request", f"wire_dtype: int8 is for hidden states, and payload={request.payload} has none; use another one")


def check_start(request: GetBatch) -> None:
    """Raises FeedError(bad_request) where no micro-batch of the request's layout begins, or none that can be counted."""
    layout = request.layout
    if not 0 <= request.start < MAX_POSITION - layout.micro_batch_size or request.start - layout.origin >= MAX_POSITION:
        raise FeedError("bad_request", f"start: {request.start} with origin {layout.origin} is beyond what a stream can have")
    try:
        layout.place(request.start)
    except ValueError as err:
        raise FeedError("bad_request", f"start: {err}") from None


def _check_layout(layout: BatchLayout, limits: Limits) -> None:
    bounds = {"micro_batch_size": limits.max_count, "accumulation": MAX_RANKS, "world": MAX_RANKS}
    for name, most in bounds.items():
        given = getattr(layout, name)
        if not 1 <= given <= most:
            raise FeedError("bad_request", f"layout.{name}: {_short(given)}; this server allows 1 to {most}")
    if not -MAX_POSITION < layout.origin < MAX_POSITION:
        raise FeedError("bad_request", f"layout.origin: {_short(layout.origin)}; a stream has positions below 2^62")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

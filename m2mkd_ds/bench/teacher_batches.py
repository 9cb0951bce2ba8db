"""What travels in `m2mkd bench teacher`: batches with the shapes of a real answer, made from a seed, alike in both processes.

Batch number n has the content n modulo the number of contents. There is one more than requests under way, so memory that still holds
the batch that it received before is told from memory that holds this one.
Shape letters: B images, L tokens, D teacher width, V classes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2mkd_ds.bench.teacher_options import TeacherBench
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, Answer, AnswerHead, GetBatch, Hello, Limits, Payload, WireDtype
from m2mkd_ds.teacher.server.counters import Counters
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from m2mkd_ds.teacher.server.turns import Turns

PAIR = 1
"""The teaching pair that is served: its input is a hidden state, not an image."""
PRINTS = {"bench": "teacher", f"weights.teacher.{PAIR}": "none: answers come from memory"}
"""Fingerprints of both sides."""
STAND_IN = "producer: a stand-in that answers from memory, so nothing is decoded or computed"


@dataclass(frozen=True)
class Shape:
    """Sizes and types of a batch."""

    images: int
    tokens: int
    width: int
    classes: int
    wire_dtype: WireDtype
    num_contents: int
    seed: int

    @staticmethod
    def of_transfer(options: TeacherBench) -> Shape:
        """The batch whose travelling is measured."""
        o = options
        return Shape(o.images, o.tokens, o.width, o.classes, "bf16", o.in_flight + 1, o.seed)

    @property
    def layout(self) -> BatchLayout:
        """Of a single trainer: batch number n begins at position n * images."""
        return BatchLayout(micro_batch_size=self.images, accumulation=1, world=1)


class Batches:
    """All contents, in memory."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._contents = [_content(shape, number) for number in range(shape.num_contents)]
        self._views = [[_bytes_of(tensor) for tensor in content.values()] for content in self._contents]

    def tensors(self, number: int) -> dict[str, Tensor]:
        """By the names of `wire.Answer`."""
        return self._contents[number % len(self._contents)]

    def parts(self, number: int) -> list[memoryview]:
        """The same as bytes, in order."""
        return self._views[number % len(self._views)]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [len(part) for part in self.parts(0)]

    @property
    def num_bytes(self) -> int:
        """Of one batch."""
        return sum(self.sizes)

    def compare(self, number: int, pieces: Sequence[memoryview]) -> None:
        """Whether these are the bytes of that batch, however they are cut. Raises RuntimeError naming the first that is wrong."""
        at, whole = 0, np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in self.parts(number)])
        for piece in pieces:
            got = np.frombuffer(piece, dtype=np.uint8)
            expected = whole[at : at + len(got)]
            if len(got) > len(expected) or not np.array_equal(got, expected):
                raise RuntimeError(f"batch {number}: bytes from {at} on are not those that were sent")
            at += len(got)
        if at != len(whole):
            raise RuntimeError(f"batch {number}: {at} bytes came, {len(whole)} were sent")


class StandIn(Producer):
    """Answers from memory; with a pace, one batch after the other, each `pace_s` after the one before was done.

    It has what a service asks of a producer and nothing behind it: no shards, no models.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches, self.pairs, self.counters, self.turns = batches, {PAIR: None}, Counters(), Turns()  # type: ignore[dict-item]
        self.pace_s = 0.0
        self._turn = threading.Lock()
        self._free_at = 0.0

    @property
    def cache_bytes(self) -> int:
        """Nothing is kept but the contents."""
        return 0

    def answer(self, request: GetBatch) -> Answer:
        """The content of the request's number."""
        if self.pace_s:
            with self._turn:
                self._free_at = max(self._free_at, time.monotonic()) + self.pace_s
                time.sleep(max(0.0, self._free_at - time.monotonic()))
        number = request.start // self.batches.shape.images
        head = AnswerHead(
            instance=request.instance, plan=request.plan, start=request.start, pairs=request.pairs, payload=request.payload,
            wire_dtype=request.wire_dtype, with_teacher=request.with_teacher, attempt=request.attempt, step=number,
        )  # fmt: skip
        return Answer(head, dict(self.batches.tensors(number)))

    def check_layout(self, layout: BatchLayout, payload: Payload) -> None:
        """Raises ValueError for another one than the batches have."""
        if layout != self.batches.shape.layout:
            raise ValueError("this stand-in has batches of one layout only")

    def answer_bytes(self, request: GetBatch) -> int:
        """Of one answer."""
        return self.batches.num_bytes

    def work_bytes(self, request: GetBatch) -> int:
        """There is none: batches are made beforehand."""
        return 0

    def close(self) -> None:
        """Nothing to end."""


def make_service(producer: StandIn, in_flight: int) -> TeacherService:
    """A real service around the stand-in, with room for all requests that are under way."""
    num_bytes = producer.batches.num_bytes
    limits = Limits(max_count=producer.batches.shape.images, max_answer_bytes=num_bytes, max_in_flight=in_flight + 1, heartbeat_s=5.0)
    return TeacherService(producer, PRINTS, ServiceOptions(limits=limits, max_bytes=2 * (in_flight + 2) * (num_bytes + 2**20)))


def hello(shape: Shape) -> Hello:
    """A trainer's first words for such batches."""
    return Hello(
        oldest_protocol=PROTOCOL_VERSION, newest_protocol=PROTOCOL_VERSION, client="bench", rank=0, layout=shape.layout, pairs=(PAIR,),
        payload="hidden", wire_dtype=shape.wire_dtype, with_teacher=True, fingerprints=dict(PRINTS),
    )  # fmt: skip


def _content(shape: Shape, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * shape.seed + number)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[shape.wire_dtype]
    hidden_BLD = torch.randn(shape.images, shape.tokens, shape.width, generator=generator, dtype=dtype)
    targets_BV = torch.rand(shape.images, shape.classes, generator=generator).softmax(-1)
    logits_BV = torch.randn(shape.images, shape.classes, generator=generator, dtype=dtype)
    return {f"hidden.{PAIR}": hidden_BLD, "targets": targets_BV, f"logits.{PAIR}": logits_BV}


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers

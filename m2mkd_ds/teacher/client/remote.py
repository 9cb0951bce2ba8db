"""The feed from elsewhere: teacher servers answer, the trainer keeps the cursor, and nothing is trained on twice or out of order.

    RemoteFeed   answers asked ahead (answer_stream.py), made into batches in order (receive.py)
    LogitsFeed   images from a loader here, logits from a RemoteFeed

Which transport carries the answers is not known here (connection.py).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from m2mkd_ds.config import TeacherConfig
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.client.answer_stream import AnswerStream
from m2mkd_ds.teacher.client.greet import Greeting
from m2mkd_ds.teacher.client.links import Pace, TeacherLostError
from m2mkd_ds.teacher.client.receive import Assembler
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import OLDEST_PROTOCOL, PROTOCOL_VERSION, Hello, WireDtype

_WIRE_OF: dict[torch.dtype, WireDtype] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What one rank will ask for, from first to last."""

    layout: BatchLayout
    rank: int
    start_step: int
    total_steps: int
    pairs: tuple[int, ...]
    """Teaching pairs that any request may name; all of them are asked for every time."""
    with_teacher: bool
    fingerprints: Mapping[str, str]
    """Of the run as the trainer has it (handshake.py)."""

    @property
    def numbers(self) -> range:
        """Micro-batches of the rank: step * accumulation + micro_step."""
        return range(self.start_step * self.layout.accumulation, self.total_steps * self.layout.accumulation)

    def slots(self, number: int) -> range:
        """Stream positions of one micro-batch."""
        step, micro_step = divmod(number, self.layout.accumulation)
        return self.layout.positions(step, micro_step, self.rank)


class RemoteFeed:
    """Batches of `stream` from teacher servers. One trainer thread may use it, in the process that made it.

    `connect`: endpoint -> connection, nothing said yet. `golden`: see greet.Greeting. `fallback`: start step -> feed in this process, for
    on_teacher_loss=colocate. Servers are asked from the moment this is made. Raises ValueError for settings that cannot work.
    """

    def __init__(
        self,
        stream: Stream,
        config: TeacherConfig,
        assembler: Assembler,
        connect: Callable[[str], Connection],
        golden: Greeting | None,
        fallback: Callable[[int], TeacherFeed] | None,
        *,
        pace: Pace = Pace(),  # noqa: B008  # frozen
    ) -> None:
        _check(stream, config, fallback)
        self._stream, self._config, self._assembler, self._fallback = stream, config, assembler, fallback
        self._next = stream.numbers.start
        self._process = os.getpid()
        self._tally = _Tally()
        self._colocated: TeacherFeed | None = None
        self._is_closed = False
        hello = Hello(
            oldest_protocol=OLDEST_PROTOCOL, newest_protocol=PROTOCOL_VERSION, client=secrets.token_hex(8), rank=stream.rank,
            layout=stream.layout, pairs=stream.pairs, payload=config.payload, wire_dtype=wire_dtype(config, assembler.dtype),
            with_teacher=stream.with_teacher, fingerprints=dict(stream.fingerprints),
        )  # fmt: skip
        self._answers = AnswerStream(
            hello, stream.numbers, lambda number: stream.slots(number).start, config, connect, golden, assembler.expect,
            assembler.receive, pace,
        )  # fmt: skip

    @property
    def is_colocated(self) -> bool:
        """Whether the teacher was taken into this process because no server answered."""
        return self._colocated is not None

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """The next micro-batch of the stream.

        Raises RuntimeError when the request names another one, TeacherLostError and TeacherRefusedError (both RuntimeError) when it
        cannot be had.
        """
        self._check_turn(request)
        if self._colocated is None:
            under_way = self._answers.num_under_way()
            try:
                answer, wait_s = self._answers.take()
            except TeacherLostError as lost:
                self._move_in(request, lost)
            else:
                self._tally.add(request.step, wait_s, under_way)
                self._next += 1
                return self._assembler.batch(answer, request, wait_s)
        assert self._colocated is not None
        batch = self._colocated.batch(request)
        self._next += 1
        return batch

    def metrics(self) -> dict[str, float]:
        """Since the last call: seconds waited, bytes that came, tries made again, answers from another server than was asked first,
        answers dropped as not asked for (duplicates) or damaged (corrupt), steps that had to wait, mean requests under way; and
        whether the teacher is in this process now."""
        counts = {f"teacher/{name}": value for name, value in self._answers.counts.take().items()}
        return {**self._tally.take(), **counts, "teacher/colocated": float(self.is_colocated)}

    def close(self) -> None:
        """End threads and connections, within `Pace.close_s` and what a fallback takes. In a forked child, nothing is done."""
        if self._is_closed or os.getpid() != self._process:
            return
        self._is_closed = True
        self._answers.close()
        if self._colocated is not None:
            self._colocated.close()

    def _check_turn(self, request: BatchRequest) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this teacher feed was made in process {self._process} and is used in {os.getpid()}: its threads and connections do not "
                "survive a fork; make the feed in the process that uses it, and start workers by spawn"
            )
        if self._is_closed:
            raise RuntimeError("this teacher feed was closed; make another one")
        if self._next >= self._stream.numbers.stop:
            raise RuntimeError(f"step {request.step}: the stream of this teacher feed ends before step {self._stream.total_steps}")
        due = divmod(self._next, self._stream.layout.accumulation)
        slots = self._stream.slots(self._next)
        if (request.step, request.micro_step) != due or request.slots != slots:
            raise RuntimeError(
                f"step {request.step}, micro-step {request.micro_step}, slots {request.slots} were asked for; next in this feed is "
                f"step {due[0]}, micro-step {due[1]}, slots {slots}: trainer and feed were started at different positions"
            )
        odd = sorted(set(request.pairs) - set(self._stream.pairs))
        if odd or (request.with_teacher and not self._stream.with_teacher):
            what = f"pairs {odd}" if odd else "teacher logits"
            raise RuntimeError(f"step {request.step}: {what} were asked for, and this feed was made for pairs {self._stream.pairs} without")

    def _move_in(self, request: BatchRequest, lost: TeacherLostError) -> None:
        """Take the teacher into this process and bring it to the position of `request`; or raise `lost`."""
        if self._config.on_teacher_loss != "colocate" or self._fallback is None:
            raise lost
        logger.error("%s. The teacher moves into this process at step %d and stays until the end of the phase", lost, request.step)
        self._answers.close()
        feed = self._fallback(request.step)
        for micro_step in range(request.micro_step):  # of this step, trained on already
            slots = self._stream.layout.positions(request.step, micro_step, self._stream.rank)
            feed.batch(BatchRequest(request.step, micro_step, slots, (min(self._stream.pairs),), False))
        self._colocated = feed


class LogitsFeed:
    """payload=logits: `images` (a feed here that needs no teachers) gives hidden states and targets, `logits` what the teacher says."""

    def __init__(self, images: TeacherFeed, logits: RemoteFeed) -> None:
        self._images, self._logits = images, logits

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """Both halves for the same slots; raises what either does."""
        told = self._logits.batch(request)
        if self._logits.is_colocated:  # the teacher moved in here, and brings a loader of its own
            self._images.close()
            return told
        images = self._images.batch(replace(request, with_teacher=False))
        lost = images.lost or told.lost or other_images(images, told)
        return replace(
            images, teacher_logits=told.teacher_logits, lost=lost, bad=tuple(dict.fromkeys((*images.bad, *told.bad))),
            wait_s=images.wait_s + told.wait_s,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Of both."""
        return {**self._images.metrics(), **self._logits.metrics()}

    def close(self) -> None:
        """Both."""
        self._images.close()
        self._logits.close()


def other_images(ours: TeacherBatch, theirs: TeacherBatch) -> str:
    """Why the server's logits are not those of the images here: one side replaced a damaged image that the other could read."""
    here, there = ({bad.position: bad.substitute for bad in side.bad} for side in (ours, theirs))
    for position in sorted(here.keys() | there.keys()):
        if here.get(position) != there.get(position):
            told = ["read" if side.get(position) is None else f"replaced by sample {side[position]}" for side in (here, there)]
            return (
                f"stream position {position}: its image was {told[0]} here and {told[1]} by the teacher server, so the logits are another "
                "image's; check the shards on both hosts with `m2mkd shards verify`"
            )
    return ""


def wire_dtype(config: TeacherConfig, dtype: torch.dtype) -> WireDtype:
    """How hidden states travel: teacher.wire_dtype, or the precision `dtype` of the phase, which changes no bit."""
    return _WIRE_OF[dtype] if config.wire_dtype == "auto" else config.wire_dtype


class _Tally:
    """What waiting cost since it was last taken."""

    def __init__(self) -> None:
        self._starved_step = -1
        self._begin()

    def _begin(self) -> None:
        self._wait_s, self._starved, self._under_way, self._num = 0.0, 0, 0, 0

    def add(self, step: int, wait_s: float, under_way: int) -> None:
        self._wait_s += wait_s
        self._under_way += under_way
        self._num += 1
        if wait_s and step != self._starved_step:
            self._starved, self._starved_step = self._starved + 1, step

    def take(self) -> dict[str, float]:
        taken = {
            "teacher/wait_s": self._wait_s,
            "teacher/starved_steps": float(self._starved),
            "teacher/in_flight": self._under_way / max(self._num, 1),
        }
        self._begin()
        return taken


def _check(stream: Stream, config: TeacherConfig, fallback: Callable[[int], TeacherFeed] | None) -> None:
    if not stream.pairs or len(set(stream.pairs)) != len(stream.pairs):
        raise ValueError(f"pairs are {stream.pairs}: give each teaching pair once, and at least one")
    if not 0 <= stream.start_step <= stream.total_steps:
        raise ValueError(f"start_step {stream.start_step} must lie between 0 and total_steps {stream.total_steps}")
    if config.on_teacher_loss == "colocate" and fallback is None:
        raise ValueError("teacher.on_teacher_loss=colocate needs the shards and the teacher's modules here: no fallback feed was given")
    if config.payload == "logits" and not stream.with_teacher:
        raise ValueError("teacher.payload=logits asks servers for nothing else, and no logits are needed here (kd_weight is 0)")

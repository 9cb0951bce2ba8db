"""One micro-batch on a server: what it consists of, each made once, whoever asks for it, and in the very operations of a trainer.

    images      decoded and augmented (decode_pool.py)
    h_0         finished on the device and in the models' dtype; with it the targets
    h_i         M_{i-1}(h_{i-1}), for i = 1, 2, ... as far as somebody asks
    logits_i    the suffix of T_i(h_i)

Micro-batches are computed as they are asked for, never joined or split: on another batch size a matrix product may round otherwise.
Shape letters: B images, L tokens, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distill.hybrid import FrozenMeta, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.counters import Counters
from m2mkd_ds.teacher.decode_pool import Decoder
from m2mkd_ds.teacher.numbers import peaks
from m2mkd_ds.teacher.shards_ahead import ShardsAhead
from m2mkd_ds.teacher.shared_cache import Entry
from m2mkd_ds.teacher.turns import Turns


@dataclass(frozen=True)
class Images:
    """What the decoder made."""

    batch: WorkerBatch

    def tensors(self) -> Sequence[Tensor]:
        work = self.batch.work
        values = [getattr(part, field.name) for part in (self.batch, work) if part is not None for field in fields(part)]
        return [value for value in values if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Output:
    """A tensor on the device, the largest absolute value of each of its images, and for h_0 the targets [B, V] on the CPU."""

    tensor: Tensor
    peaks_B: tuple[float, ...]
    targets_BV: Tensor | None = None

    def tensors(self) -> Sequence[Tensor]:
        return [self.tensor] if self.targets_BV is None else [self.tensor, self.targets_BV]


@dataclass(frozen=True)
class Machine:
    """What micro-batches are made with."""

    decoder: Decoder
    finish: Finisher
    meta: FrozenMeta
    teachers: dict[int, nn.Module]
    device: torch.device
    dtype: torch.dtype
    turns: Turns
    """Of the device: one piece of work at a time, of one stage or module."""
    counters: Counters
    shards_ahead: ShardsAhead | None

    def on_device(self) -> AbstractContextManager[object]:
        """A thread has a current GPU of its own."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class MicroBatch:
    """The micro-batch that begins at `start`, through its entry of the cache."""

    def __init__(self, machine: Machine, entry: Entry, layout: BatchLayout, start: int) -> None:
        self._machine, self._entry = machine, entry
        self._layout, self._start, self._place = layout, start, layout.place(start)

    def images(self) -> WorkerBatch:
        """As a loader's worker makes them. Raises SampleError (transform), DecodeError."""
        return self._entry.get("decode", 0, self._decode).batch

    def hidden(self, number: int) -> Output:
        """h_i; the chain goes on from the deepest state that is there."""
        if number == 0:
            images = self.images()
            return self._entry.get("prefix", 0, lambda: self._finish(images))
        before = self.hidden(number - 1)
        return self._entry.get("prefix", number, lambda: self._walk(number - 1, before))

    def logits(self, pair: TeachingPair) -> Output:
        """[B, V] of the teacher hybrid of `pair`."""
        hidden = self.hidden(pair.index)
        return self._entry.get("teacher", pair.index, lambda: self._teach(pair, hidden))

    def _decode(self) -> Images:
        if self._machine.shards_ahead is not None:
            self._machine.shards_ahead.advance(self._layout, self._start)
        with self._machine.counters.timed("decode_s"):
            batch = self._machine.decoder.decode(self._layout, *self._place)
        if batch.lost is not None:
            # What could not be read now may be readable when it is asked for again.
            self._entry.keep = False
            self._machine.counters.add("lost_batches")
        return Images(batch)

    def _finish(self, images: WorkerBatch) -> Output:
        machine = self._machine
        with machine.turns, machine.on_device(), machine.counters.timed("prefix_s"), torch.no_grad():
            finished = machine.finish(images, 0.0)
            pixels_BCHW = finished.images_BCHW.to(machine.device, machine.dtype, non_blocking=True)
            return Output(pixels_BCHW, peaks(pixels_BCHW), finished.targets_BV.cpu())

    def _walk(self, stage: int, hidden: Output) -> Output:
        """One step of FrozenMeta.hidden_states."""
        machine = self._machine
        with machine.turns, machine.on_device(), machine.counters.timed("prefix_s"), torch.no_grad():
            x_BLD = machine.meta.stages[stage](hidden.tensor)
            return Output(x_BLD, peaks(x_BLD))

    def _teach(self, pair: TeachingPair, hidden: Output) -> Output:
        machine = self._machine
        with machine.turns, machine.on_device(), machine.counters.timed("teacher_s"):
            logits_BV = teacher_logits(machine.meta, pair, machine.teachers[pair.index], hidden.tensor)
            return Output(logits_BV, peaks(logits_BV))

"""A server's work on one micro-batch: decode and augment, prefix chain, teacher modules, each once for whoever asks.

Everything is a function of the request, so a cache decides about time only. Shape letters: B images, L tokens, D width, V classes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.batches import TrainBatches
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.wire import Answer, AnswerHead, GetBatch, WireDtype


@dataclass(frozen=True)
class TeacherParts:
    """The frozen models of a run and the stream they are shown: what a server holds."""

    index: ShardIndex
    data: DataConfig
    seed: int
    pairs: tuple[TeachingPair, ...]
    meta: FrozenMeta
    """All stages that prefixes and suffixes of `pairs` need."""
    teachers: Mapping[int, nn.Module]
    """T_i by pair."""
    device: torch.device
    dtype: torch.dtype
    """What the models compute in."""


class Producer:
    """Answers requests from `parts`; safe to call from several threads."""

    def __init__(self, parts: TeacherParts) -> None:
        self.parts = parts
        self._pairs = {pair.index: pair for pair in parts.pairs}
        self._teachers = {i: freeze(module) for i, module in parts.teachers.items()}
        self._finish = Finisher(parts.data, parts.device, smoothing=parts.data.augment.label_smoothing)
        self._batches: dict[BatchLayout, TrainBatches] = {}
        self._lock = threading.Lock()

    def answer(self, request: GetBatch) -> Answer:
        """The micro-batch of the request. Raises SampleError where augmentation fails, ValueError where no micro-batch begins."""
        with self._lock:
            images = self._decode(request)
            tensors = self._compute(request, images)
        head = AnswerHead(
            instance=request.instance, plan=request.plan, start=request.start, pairs=request.pairs, payload=request.payload,
            wire_dtype=request.wire_dtype, with_teacher=request.with_teacher, attempt=request.attempt, step=images.step,
            micro_step=images.micro_step, fallbacks=images.fallbacks, erase_pixels=images.work.erase_pixels if images.work else 0,
            bad=images.bad, lost="" if images.lost is None else str(images.lost),
        )  # fmt: skip
        return Answer(head, tensors)

    def close(self) -> None:
        """End workers."""

    def _decode(self, request: GetBatch) -> WorkerBatch:
        parts = self.parts
        step, micro_step, rank = request.layout.place(request.start)
        batches = self._batches.get(request.layout)
        if batches is None:
            batches = self._batches[request.layout] = TrainBatches(parts.index, parts.data, seed=parts.seed, layout=request.layout, rank=0)
        batch = batches.micro_batch(step, micro_step, rank)
        if isinstance(batch, SampleError):
            raise batch
        return batch

    def _compute(self, request: GetBatch, images: WorkerBatch) -> dict[str, Tensor]:
        finished = self._finish(images, 0.0)
        pairs = [self._pairs[i] for i in request.pairs]
        hidden = self.parts.meta.hidden_states(finished.images_BCHW.to(self.parts.device, self.parts.dtype), pairs)
        tensors: dict[str, Tensor] = {}
        if request.payload == "hidden":
            tensors |= {f"hidden.{i}": to_wire(h_BLD, request.wire_dtype) for i, h_BLD in hidden.items() if i > 0}
            tensors["targets"] = finished.targets_BV.cpu()
        if request.payload == "image" or (request.payload == "hidden" and 0 in request.pairs):
            tensors |= image_tensors(images)
        if request.with_teacher:
            for pair in pairs:
                logits_BV = teacher_logits(self.parts.meta, pair, self._teachers[pair.index], hidden[pair.index])
                tensors[f"logits.{pair.index}"] = logits_BV.cpu().contiguous()
        return tensors


def image_tensors(batch: WorkerBatch) -> dict[str, Tensor]:
    """A worker's batch by the names of `Answer`."""
    named = {"image.pixels": batch.images, "image.labels": batch.labels_B, "image.targets": batch.targets_BV}
    if batch.work is not None:
        work = batch.work
        named |= {"image.flip": work.flip_B, "image.erase": work.erase_E6, "image.shares": work.shares_G4, "image.boxes": work.boxes_G4}
    return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def to_wire(hidden_BLD: Tensor, wire_dtype: WireDtype) -> Tensor:
    """The hidden state as it travels, on the CPU."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return hidden_BLD.to("cpu", dtypes[wire_dtype]).contiguous()

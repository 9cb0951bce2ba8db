"""A server's work on one request: decode and augment, prefix chain, teacher modules, each once for whoever asks, and the answer.

    request -> MicroBatch (micro_batch.py) in a SharedCache (shared_cache.py) -> finite? in range? -> numbers of the wire -> the CPU

Everything is a function of the request, so a cache decides about time only. Shape letters: B images, L tokens, D width, V classes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod

import torch
from torch import Tensor, nn

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.remote.files import CachedFiles
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.protocol.numbers import bytes_of_hidden, largest, to_wire
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, FeedError, GetBatch, Payload
from m2mkd_ds.teacher.server.counters import Counters
from m2mkd_ds.teacher.server.decode_pool import make_decoder
from m2mkd_ds.teacher.server.evaluation_images import EvaluationImages
from m2mkd_ds.teacher.server.layout_batches import LayoutBatches, Stream
from m2mkd_ds.teacher.server.micro_batch import Machine, MicroBatch, Output
from m2mkd_ds.teacher.server.shards_ahead import ShardsAhead
from m2mkd_ds.teacher.server.shared_cache import SharedCache
from m2mkd_ds.teacher.server.turns import Turns

DEFAULT_CACHE_BYTES = 4 * 2**30
"""About 30 micro-batches of 128 images in bf16 with the hidden states of one ViT-L stage."""
MAX_BAD = 128
"""Damaged samples that one answer can tell of, within MAX_MESSAGE_BYTES."""
_MAX_TEXT = 100
"""Characters of each one's message, where they are many."""


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
    validation: ShardIndex | None = None
    """Shards of the validation images, for trainers that have none."""


class Producer:
    """Answers requests from `parts`; safe to call from several threads.

    `cache_bytes`: of decoded images (CPU), hidden states and logits (device) that are kept for clients who ask for the same; 0: only
    those who ask at the same time share. Decodes in `data.num_workers` processes. The tensors of an answer may be the cache's: nobody
    may change them.
    """

    def __init__(self, parts: TeacherParts, *, cache_bytes: int = DEFAULT_CACHE_BYTES, counters: Counters | None = None) -> None:
        self.parts, self.counters = parts, counters or Counters()
        self.turns = Turns()
        """Of the device, for whoever else computes on it."""
        self.pairs = {pair.index: pair for pair in parts.pairs}
        stream = Stream(parts.index, parts.data, parts.seed)
        self._stream, self._checked, self._checking = stream, LayoutBatches(stream), threading.Lock()
        self._hidden_shapes = _hidden_shapes(parts)
        self._cache = SharedCache(cache_bytes, self.counters)
        self._evaluation = EvaluationImages(None if parts.validation is None else replace(stream, index=parts.validation))
        self._decoder = make_decoder(
            stream, pin=parts.device.type == "cuda", replaced=lambda: self.counters.add("replaced_workers")
        )  # fmt: skip
        self._machine = Machine(
            decoder=self._decoder, finish=Finisher(parts.data, parts.device, smoothing=parts.data.augment.label_smoothing), meta=parts.meta,
            teachers={i: freeze(module) for i, module in parts.teachers.items()}, device=parts.device, dtype=parts.dtype, turns=self.turns,
            counters=self.counters,
            shards_ahead=ShardsAhead(stream, parts.index.files) if isinstance(parts.index.files, CachedFiles) else None,
        )  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        """Held now."""
        return self._cache.num_bytes

    def answer(self, request: GetBatch) -> Answer:
        """The micro-batch of the request.

        Raises FeedError: poisoned where an output is not finite, bad_request where the wire's type cannot hold it, both with slots;
        internal where nothing can be said. SampleError where augmentation fails, DecodeError, ValueError where no micro-batch begins.
        """
        if request.payload == "evaluation":
            images = self._evaluation.batch(request)
            return Answer(_head(request, images), image_tensors(images))
        with self.counters.busy(), self._cache.using((request.layout, request.start)) as entry:
            batch = MicroBatch(self._machine, entry, request.layout, request.start)
            images, tensors = batch.images(), self._tensors(request, batch)
        self.counters.add("images", request.layout.micro_batch_size)
        return Answer(_head(request, images), tensors)

    def check_layout(self, layout: BatchLayout, payload: Payload) -> None:
        """Raises ValueError for a layout that this stream cannot have; costs nothing for one that was checked lately."""
        if payload == "evaluation":  # any is possible: nothing is mixed, nothing repeated
            return
        with self._checking:
            self._checked.of(layout)

    def answer_bytes(self, request: GetBatch) -> int:
        """Upper bound of the bytes of its tensors, before anything is computed."""
        count, classes = request.layout.micro_batch_size, self.parts.data.num_classes
        total = 0
        if request.payload == "hidden":
            total += sum(count * bytes_of_hidden(*self._hidden_shapes[i], request.wire_dtype) for i in request.pairs if i > 0)
            total += 4 * count * classes
        if _needs_images(request):
            # Labels; then targets (pil) or, an image each at most, flip, erased box, and half a group's shares and box (fast).
            total += self.image_bytes(request) + count * (8 + max(4 * classes, 1 + 6 * 8 + 4 * 4 + 4 * 8))
        if request.with_teacher:
            total += 4 * count * classes * len(request.pairs)
        return total

    def work_bytes(self, request: GetBatch) -> int:
        """Of what is held at once while the answer is made and is no part of it: decoded images, finished ones, all h_i on the way."""
        images = 0 if _needs_images(request) else self.image_bytes(request)
        if request.payload == "evaluation" or (request.payload == "image" and not request.with_teacher):
            return images
        walk = sum(self._hidden_numbers(i) for i in range(max(request.pairs) + 1))
        return images + request.layout.micro_batch_size * walk * self.parts.dtype.itemsize

    def image_bytes(self, request: GetBatch) -> int:
        """Of the decoded images."""
        return self._stream.image_bytes(request.layout.micro_batch_size)

    def golden_bytes(self, count: int, pairs: Iterable[int]) -> int:
        """About what golden outputs of `count` images hold at once.

        The walk in the models' dtype, then hidden, module and logits of each pair in fp32.
        """
        pairs = set(pairs)
        # A module's output is the next hidden state, or logits; where neither is known it is like what goes in.
        numbers = {i: self._hidden_numbers(i) for i in range(max(pairs) + 2)}
        sent = sum(numbers[i] + max(numbers[i + 1] or numbers[i], self.parts.data.num_classes) + self.parts.data.num_classes for i in pairs)
        walk = sum(numbers[i] for i in range(max(pairs) + 1))
        return count * (4 * sent + self.parts.dtype.itemsize * walk)

    def _hidden_numbers(self, number: int) -> int:
        """Of h_i of one image; 0 where no pair reaches that far."""
        if number == 0:
            return 3 * self.parts.data.image_size**2
        return prod(self._hidden_shapes.get(number, (0, 0)))

    def close(self) -> None:
        """End the workers; answers under way fail."""
        self._evaluation.close()
        self._decoder.close()
        if self._machine.shards_ahead is not None:
            self._machine.shards_ahead.close()

    def _tensors(self, request: GetBatch, batch: MicroBatch) -> dict[str, Tensor]:
        """By the names of `Answer`, on the CPU."""
        images = batch.images()
        device: dict[str, Tensor] = {}
        host: dict[str, Tensor] = {}
        if request.payload == "hidden":
            for i in request.pairs:
                hidden = self._good(batch.hidden(i), f"hidden.{i}", images)
                if i > 0:
                    device |= self._cast(request, i, hidden, images)
            targets_BV = batch.hidden(0).targets_BV
            assert targets_BV is not None
            host["targets"] = targets_BV
        if _needs_images(request):
            host |= image_tensors(images)
        if request.with_teacher:
            device |= {f"logits.{i}": self._good(batch.logits(self.pairs[i]), f"logits.{i}", images).tensor for i in request.pairs}
        with self.counters.timed("cast_s"), self._machine.on_device():
            return host | _on_cpu(device)

    def _good(self, output: Output, name: str, images: WorkerBatch) -> Output:
        """Raises FeedError(poisoned) with the slots of the images that are not finite."""
        slots = tuple(int(slot) for slot, peak in zip(images.slot_ids_B, output.peaks_B, strict=True) if not isfinite(peak))
        if not slots:
            return output
        self.counters.add("poisoned")
        raise FeedError(
            "poisoned",
            f"{name} of pair {name.partition('.')[2]} is not finite for {len(slots)} of {len(images.slot_ids_B)} images (slots "
            f"{_some(slots)}): the weights of teacher or meta model are damaged, or {str(self.parts.dtype).removeprefix('torch.')} is too "
            "narrow for them",
            slots=slots,
        )

    def _cast(self, request: GetBatch, pair: int, hidden: Output, images: WorkerBatch) -> dict[str, Tensor]:
        """Raises FeedError(bad_request) where the type that was asked for cannot hold the numbers: asking again would not help."""
        top, slot_ids = largest(request.wire_dtype), images.slot_ids_B.tolist()
        slots = tuple(slot for slot, peak in zip(slot_ids, hidden.peaks_B, strict=True) if peak > top)
        if slots:
            raise FeedError(
                "bad_request",
                f"wire_dtype {request.wire_dtype} ends at {top:g}, hidden.{pair} of pair {pair} reaches {max(hidden.peaks_B):g} (slots "
                f"{_some(slots)}); set teacher.wire_dtype to bf16 or fp32",
                slots=slots,
            )
        with self.counters.timed("cast_s"), self._machine.on_device():
            return {f"hidden.{pair}{suffix}": tensor for suffix, tensor in to_wire(hidden.tensor, request.wire_dtype).items()}


def _head(request: GetBatch, images: WorkerBatch) -> AnswerHead:
    return AnswerHead(
        instance=request.instance, plan=request.plan, start=request.start, pairs=request.pairs, payload=request.payload,
        wire_dtype=request.wire_dtype, with_teacher=request.with_teacher, attempt=request.attempt, step=images.step,
        micro_step=images.micro_step, fallbacks=images.fallbacks, erase_pixels=images.work.erase_pixels if images.work else 0,
        bad=_told(images.bad), lost="" if images.lost is None else str(images.lost)[:4096],
    )  # fmt: skip


def image_tensors(batch: WorkerBatch) -> dict[str, Tensor]:
    """A worker's batch by the names of `Answer`; pixels stay as they are, float ones too: mixing leaves fp32, and a cast would show."""
    named = {"image.pixels": batch.images, "image.labels": batch.labels_B, "image.targets": batch.targets_BV}
    if batch.work is not None:
        work = batch.work
        named |= {"image.flip": work.flip_B, "image.erase": work.erase_E6, "image.shares": work.shares_G4, "image.boxes": work.boxes_G4}
    return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def _needs_images(request: GetBatch) -> bool:
    return request.payload in ("image", "evaluation") or (request.payload == "hidden" and 0 in request.pairs)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU; from a GPU through page-locked memory, all copies queued before one wait."""
    copied = {}
    for name, tensor in tensors.items():
        source = tensor.contiguous()
        if source.device.type == "cuda":
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            copied[name] = target.copy_(source, non_blocking=True)
        else:
            copied[name] = source.cpu()
    if any(tensor.device.type == "cuda" for tensor in tensors.values()):
        # Waits for this thread's stream, not for what other threads have queued elsewhere.
        torch.cuda.current_stream().synchronize()
    return copied


def _hidden_shapes(parts: TeacherParts) -> dict[int, tuple[int, int]]:
    """(L, D) of all h_i on the way to the last pair's: one walk with a black image, which also shows early that the stages fit together."""
    x = torch.zeros(1, 3, parts.data.image_size, parts.data.image_size, device=parts.device, dtype=parts.dtype)
    shapes = {}
    for stage in range(max(pair.index for pair in parts.pairs)):
        x = parts.meta.stages[stage](x)
        shapes[stage + 1] = (x.shape[1], x.shape[2])
    return shapes


def _told(bad: tuple[BadSample, ...]) -> tuple[BadSample, ...]:
    """Records as an answer carries them. Raises FeedError(internal) for more than it may: then the storage is gone, not an image."""
    if len(bad) > MAX_BAD:
        raise FeedError("internal", f"{len(bad)} samples of one micro-batch could not be read, the first one because: {bad[0].message}")
    if sum(len(record.message) for record in bad) <= MAX_BAD * _MAX_TEXT:
        return bad
    return tuple(replace(record, message=record.message[:_MAX_TEXT]) for record in bad)


def _some(slots: tuple[int, ...]) -> str:
    return ", ".join(map(str, slots[:8])) + (", ..." if len(slots) > 8 else "")

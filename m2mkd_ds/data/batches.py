"""What a loader's worker does: the number of a micro-batch -> its images, augmented, with damaged ones replaced.

The unit of work is a whole micro-batch. A damaged image's place is taken by the next readable one of the order, with the random
numbers of the place, so every rank and every worker would take the same; where none can be read, the batch says so (`lost`). Errors
travel as values: what DataLoader makes of an exception in a worker has lost its kind.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.batch import DeviceWork, WorkerBatch
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.fast_transforms import NO_ERASE, Drawn, FastEval, FastTrain
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.mix import MixDraw, group_draws, soft_targets
from m2mkd_ds.data.order import Slot, make_order
from m2mkd_ds.data.pil_transforms import ImageTransform, eval_transform, train_transform
from m2mkd_ds.data.plan import BatchLayout, eval_samples
from m2mkd_ds.data.ring import Place, Ring, Turn, shared_tensor
from m2mkd_ds.data.shard_files import IoCounts
from m2mkd_ds.data.transforms import Mixer

MAX_SUBSTITUTES = 50
"""Samples tried in place of a damaged one; so many damaged ones in a row mean that the storage is gone, not an image."""


class _LostPlaceError(Exception):
    """Neither the sample of a place nor any of its substitutes could be read."""

    def __init__(self, error: SampleError, records: list[BadSample]) -> None:
        super().__init__(str(error))
        self.error, self.records = error, records


class _Meter:
    """What a process does to get bytes from elsewhere, batch by batch."""

    def __init__(self, index: ShardIndex) -> None:
        self._index, self._told = index, index.files.counts()

    def since(self) -> IoCounts:
        """Since the last call."""
        before, self._told = self._told, self._index.files.counts()
        return self._told.plus(before, -1)

    def __reduce__(self) -> tuple[type[_Meter], tuple[ShardIndex]]:
        return _Meter, (self._index,)  # a worker's files are its own, and begin to count anew


class Batches(Dataset["WorkerBatch | SampleError"], ABC):
    """Micro-batches by number; asked for a `Turn`, with the images at its place of `ring`."""

    ring: Ring | None = None
    _transform: ImageTransform | FastTrain | FastEval

    def __init__(self, size: int, index: ShardIndex) -> None:
        self._size, self._meter = size, _Meter(index)

    def use_ring(self, count: int) -> Ring:
        """Let images be put where a turn says, from now on: a ring of `count` places. Before the workers start."""
        self.ring = Ring(count, *_images_like(self._size, self._transform))
        return self.ring

    def __getitem__(self, turn: int | Turn) -> WorkerBatch | SampleError:
        number, place = turn if isinstance(turn, Turn) else (turn, None)
        try:
            batch = self._batch(number, place)
            return replace(batch, io=self._meter.since()).left_at(place)
        except SampleError as err:
            return err

    @abstractmethod
    def _batch(self, number: int, place: Place | None) -> WorkerBatch:
        """Raises SampleError."""

    def _empty_images(self, count: int, place: Place | None) -> Tensor:
        """The batch to fill; in a worker in shared memory at once, so that it is not copied on its way."""
        if place is not None:
            assert self.ring is not None
            return self.ring.images(place, count)
        shape, dtype = _images_like(count, self._transform)
        return torch.empty(shape, dtype=dtype) if get_worker_info() is None else shared_tensor(shape, dtype)


class TrainBatches(Batches):
    """Micro-batch number k of a rank: step k // accumulation, micro-step k % accumulation."""

    def __init__(self, index: ShardIndex, data: DataConfig, *, seed: int, layout: BatchLayout, rank: int) -> None:
        super().__init__(layout.micro_batch_size, index)
        self._index, self._layout, self._rank, self._seed = index, layout, rank, seed
        self._num_classes = data.num_classes
        self._transform: ImageTransform | FastTrain = FastTrain(data) if data.decode == "fast" else train_transform(data)
        self.mixer = Mixer(data.augment, data.num_classes, seed)
        self.order = make_order(data, seed, index.shard_sizes, layout)

    def micro_batch(self, step: int, micro_step: int, rank: int) -> WorkerBatch | SampleError:
        """The micro-batch of any rank."""
        try:
            return self._batch_of(step, micro_step, rank, None)
        except SampleError as err:
            return err

    def _batch(self, number: int, place: Place | None) -> WorkerBatch:
        return self._batch_of(*divmod(number, self._layout.accumulation), self._rank, place)

    def _batch_of(self, step: int, micro_step: int, rank: int, place: Place | None) -> WorkerBatch:
        positions = self._layout.positions(step, micro_step, rank)
        images = self._empty_images(len(positions), place)
        filled = []
        with KeyedRandom() as keyed:
            for image, position in zip(images, positions, strict=True):
                try:
                    filled.append(self._fill(position, image, keyed))
                except _LostPlaceError as lost:
                    bad = [record for _, _, faults in filled for record in faults]
                    return self._lost_batch(images, (step, micro_step, rank), lost.error, [*bad, *lost.records])
        labels_B = torch.tensor([label for label, _, _ in filled])
        drawn = [work for _, work, _ in filled if work is not None]
        in_step = self._layout.group(micro_step, rank) * len(positions)
        targets_BV, work = None, None
        if drawn:
            draws = self.mixer.draw(len(positions), self._transform.size, step=step, in_step=in_step) if self.mixer.mixes else ()
            work = _device_work(drawn, draws)
        else:
            images, targets_BV = self.mixer(images, labels_B, step=step, in_step=in_step)
        return WorkerBatch(
            images=images, labels_B=labels_B, slot_ids_B=torch.tensor(positions), step=step, micro_step=micro_step, targets_BV=targets_BV,
            work=work, bad=tuple(record for _, _, faults in filled for record in faults), fallbacks=sum(d.fallback for d in drawn),
        )  # fmt: skip

    def _fill(self, position: int, out: Tensor, keyed: KeyedRandom) -> tuple[int, Drawn | None, list[BadSample]]:
        """Put the image of a position into `out`: its label, what the device has to do, and what was wrong with samples before it."""
        slot = self.order.slot(position)
        faults: list[tuple[int, SampleError]] = []
        for sample in chain((slot.sample,), islice(self.order.substitutes(position), MAX_SUBSTITUTES)):
            try:
                label, drawn = self._use(sample, slot, out, keyed)
            except SampleError as err:
                if err.kind == "transform":
                    raise SampleError(f"{err} (stream position {position}, {slot})", err.kind) from err
                faults.append((sample, err))
            else:
                return label, drawn, [_record(self._index, damaged, err, position, sample) for damaged, err in faults]
        first = f"{faults[0][1]} (stream position {position})"
        message = f"{first}; nor can any of the {len(faults) - 1} samples be read that could take its place"
        raise _LostPlaceError(
            SampleError(message, faults[0][1].kind), [_record(self._index, damaged, err, position, -1) for damaged, err in faults]
        )

    def _lost_batch(self, images: Tensor, place: tuple[int, int, int], error: SampleError, bad: list[BadSample]) -> WorkerBatch:
        """A batch of zeros that says why: what reads it keeps in step with the other ranks, and stops with them."""
        step, micro_step, rank = place
        positions = self._layout.positions(step, micro_step, rank)
        labels_B = torch.zeros(len(positions), dtype=torch.int64)
        targets_BV = soft_targets(labels_B, self._num_classes, 0.0) if isinstance(self._transform, ImageTransform) else None
        return WorkerBatch(
            images=images.zero_(), labels_B=labels_B, slot_ids_B=torch.tensor(positions), step=step, micro_step=micro_step,
            targets_BV=targets_BV, bad=tuple(bad), lost=error,
        )  # fmt: skip

    def _use(self, sample: int, slot: Slot, out: Tensor, keyed: KeyedRandom) -> tuple[int, Drawn | None]:
        data, label = _read(self._index, sample)
        seed = keyed.seed if self._transform.draws_from_numpy else keyed.seed_without_numpy
        seed("sample", self._seed, *slot)
        return label, _transformed(self._transform, data, out, self._index, sample)


class EvalBatches(Batches):
    """Evaluation batch number b of a rank; any damaged image is an error."""

    def __init__(self, index: ShardIndex, data: DataConfig, *, batch_size: int, rank: int, world: int) -> None:
        super().__init__(batch_size, index)
        self._index, self._num_classes = index, data.num_classes
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._transform: ImageTransform | FastEval = FastEval(data) if data.decode == "fast" else eval_transform(data)

    def micro_batch(self, step: int, micro_step: int, rank: int) -> WorkerBatch | SampleError:
        """Batch number `step` of any rank; `micro_step` is 0, there is no accumulation."""
        try:
            return self._batch_of(step, rank, None)
        except SampleError as err:
            return err

    def _batch(self, number: int, place: Place | None) -> WorkerBatch:
        return self._batch_of(number, self._rank, place)

    def _batch_of(self, number: int, rank: int, place: Place | None) -> WorkerBatch:
        samples = eval_samples(number, rank, batch_size=self._batch_size, world=self._world, num_samples=self._index.num_samples)
        images = self._empty_images(len(samples), place)
        labels, fallbacks = [], 0
        for image, sample in zip(images, samples, strict=True):
            data, label = _read(self._index, sample)
            drawn = _transformed(self._transform, data, image, self._index, sample)
            labels.append(label)
            fallbacks += drawn is not None and drawn.fallback
        labels_B = torch.tensor(labels)
        targets_BV = soft_targets(labels_B, self._num_classes, 0.0) if isinstance(self._transform, ImageTransform) else None
        return WorkerBatch(
            images=images, labels_B=labels_B, slot_ids_B=torch.tensor(samples), step=number, micro_step=0, targets_BV=targets_BV,
            fallbacks=fallbacks,
        )  # fmt: skip


def _images_like(count: int, transform: ImageTransform | FastTrain | FastEval) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a batch of images."""
    size = transform.size
    if isinstance(transform, ImageTransform):
        return (count, 3, size, size), torch.float32
    return (count, size, size, 3), torch.uint8


def _read(index: ShardIndex, sample: int) -> tuple[bytes, int]:
    """Bytes and label; whatever the file system says becomes SampleError(kind="io")."""
    try:
        data, label, _ = index.read(sample)
    except OSError as err:
        raise SampleError(f"{index.describe(sample)}: cannot read its shard ({err})", "io") from err
    return data, label


def _transformed(
    transform: ImageTransform | FastTrain | FastEval, data: bytes, out: Tensor, index: ShardIndex, sample: int
) -> Drawn | None:
    """Run the transform; its errors name the sample."""
    try:
        return transform.file_into(data, out)
    except SampleError as err:
        raise SampleError(f"{index.describe(sample)}: {err}", err.kind) from err
    except Exception as err:
        # An error of ours or of timm's: the place in the code is what helps, and it would not survive the way out of a worker.
        *_, last = traceback.extract_tb(err.__traceback__)
        raise SampleError(
            f"{index.describe(sample)}: augmentation failed ({type(err).__name__}: {err}; {last.filename}:{last.lineno} in {last.name}); "
            "this is a bug or a setting that does not fit, not a damaged image",
            "transform",
        ) from err


def _record(index: ShardIndex, sample: int, err: SampleError, position: int, substitute: int) -> BadSample:
    row = index.table[sample]
    return BadSample(
        kind=err.kind, shard=index.shards[int(row["shard"])].name, key=row["key"].decode(), sample=sample, position=position,
        substitute=substitute, message=str(err),
    )  # fmt: skip


def _device_work(drawn: Sequence[Drawn], draws: Sequence[MixDraw]) -> DeviceWork:
    """Draws of single images and of groups as tensors."""
    erased = [(place, *work.erase) for place, work in enumerate(drawn) if work.erase != NO_ERASE]
    shares_G4, boxes_G4 = group_draws(draws) if any(draw.share != 1.0 for draw in draws) else (None, None)
    return DeviceWork(
        flip_B=torch.tensor([work.flip for work in drawn]) if any(work.flip for work in drawn) else None,
        erase_E6=torch.tensor(erased) if erased else None,
        erase_pixels=sum(height * width for _, _, _, height, width, _ in erased),
        shares_G4=shares_G4,
        boxes_G4=boxes_G4,
    )

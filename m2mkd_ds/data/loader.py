"""From an index and a plan to batches: `TrainLoader` (endless stream, resumable at any step) and `EvalLoader` (exact cover).

The unit of work of a loader worker is a whole micro-batch, named by its number. So the order cannot depend on the
number of workers, resuming is starting to count elsewhere, and no worker has state worth saving. Workers are spawned
(a forked child of a process that uses threads or CUDA may hang) and import this file, timm and torch only.

Shape letters: B images of a micro-batch, C channels, H W pixels, V classes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.order import make_order
from m2mkd_ds.data.plan import BatchLayout, eval_samples, num_eval_batches
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.transforms import ImageTransform, KeyedRandom, Mixer, eval_transform, soft_targets, train_transform

_UNDECODABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error)
"""What Pillow raises for damaged files, format by format."""


@dataclass(frozen=True)
class ImageBatch:
    """One micro-batch of one rank."""

    images_BCHW: Tensor
    """float32, normalised."""
    targets_BV: Tensor
    """float32 soft targets, rows sum to 1."""
    labels_B: Tensor
    """int64 labels before mixing."""
    slot_ids_B: Tensor
    """int64: positions of the endless training stream; in evaluation, sample numbers."""
    step: int
    """Optimizer step; in evaluation, the number of the batch."""
    micro_step: int
    """0 .. accumulation - 1; 0 in evaluation."""
    bad: tuple[BadSample, ...] = ()
    """Damaged samples that were replaced in this batch; never in evaluation, where they raise."""


def check_data(data: DataConfig) -> tuple[ShardIndex, ShardIndex]:
    """Load and cross-check both folders before compute is spent: (train, validation).

    Raises ShardError when a folder is damaged or empty, or when the class counts of folders and config differ.
    """
    indices = []
    for name in ("train", "validation"):
        folder = getattr(data, name)
        if not folder:
            raise ShardError(f"data.{name} is empty; give the folder of the {name} shards (`m2mkd shards write` makes them)")
        index = ShardIndex.load(folder, Access.from_config(data))
        if index.num_classes != data.num_classes:
            raise ShardError(
                f"data.num_classes is {data.num_classes}, but data.{name} ({folder}) has {index.num_classes} classes; make them equal"
            )
        if not index.num_samples:
            raise ShardError(f"data.{name} ({folder}) has no samples; write the shards again")
        indices.append(index)
    train, validation = indices
    if train.class_names != validation.class_names:
        pairs = zip(train.class_names, validation.class_names, strict=True)
        number, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ShardError(
            f"class {number} is {ours!r} in data.train ({data.train}) and {theirs!r} in data.validation ({data.validation}); "
            "both must come from the same list of classes"
        )
    return train, validation


def decode(index: ShardIndex, sample: int) -> tuple[Image.Image, int]:
    """RGB image and label of a sample; grey is repeated, transparency dropped.

    Raises SampleError (shard, key, sample) for damaged bytes.
    """
    data, label, _ = index.read(sample)
    try:
        return Image.open(io.BytesIO(data)).convert("RGB"), label
    except _UNDECODABLE as err:
        raise SampleError(f"{index.describe(sample)}: cannot decode the image ({type(err).__name__}: {err})") from err


class _TrainBatches(Dataset[ImageBatch]):
    """Micro-batch number k of a rank: step k // accumulation, micro-step k % accumulation."""

    def __init__(self, index: ShardIndex, data: DataConfig, *, seed: int, layout: BatchLayout, rank: int) -> None:
        self._index, self._layout, self._rank, self._seed = index, layout, rank, seed
        self._transform = train_transform(data)
        self._mixer = Mixer(data.augment, data.num_classes, seed)
        self._order = make_order(data, seed, index.shard_sizes, layout)

    def __getitem__(self, number: int) -> ImageBatch:
        step, micro_step = divmod(number, self._layout.accumulation)
        slots = self._layout.positions(step, micro_step, self._rank)
        size = self._transform.size
        images_BCHW = torch.empty(len(slots), 3, size, size)
        labels = []
        with KeyedRandom() as keyed:
            for place, position in enumerate(slots):
                slot = self._order.slot(position)
                try:
                    image, label = decode(self._index, slot.sample)
                except SampleError as err:
                    raise SampleError(f"{err} (stream position {position})") from err
                keyed.seed("sample", self._seed, *slot)
                self._transform.into(image, images_BCHW[place])
                labels.append(label)
        labels_B = torch.tensor(labels)
        group = self._layout.group(micro_step, self._rank)
        images_BCHW, targets_BV = self._mixer(images_BCHW, labels_B, step=step, group=group)
        return ImageBatch(images_BCHW, targets_BV, labels_B, torch.tensor(slots), step, micro_step)


class _EvalBatches(Dataset[ImageBatch]):
    """Evaluation batch number b of a rank."""

    def __init__(self, index: ShardIndex, data: DataConfig, *, batch_size: int, rank: int, world: int) -> None:
        self._index, self._num_classes = index, data.num_classes
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._transform: ImageTransform = eval_transform(data)

    def __getitem__(self, number: int) -> ImageBatch:
        samples = eval_samples(
            number, self._rank, batch_size=self._batch_size, world=self._world, num_samples=self._index.num_samples
        )  # fmt: skip
        size = self._transform.size
        images_BCHW = torch.empty(len(samples), 3, size, size)
        labels = []
        for place, sample in enumerate(samples):
            image, label = decode(self._index, sample)
            self._transform.into(image, images_BCHW[place])
            labels.append(label)
        labels_B = torch.tensor(labels)
        return ImageBatch(images_BCHW, soft_targets(labels_B, self._num_classes, 0.0), labels_B, torch.tensor(samples), number, 0)


class TrainLoader:
    """Batches of one rank in order (step, micro_step), from `start_step` to `total_steps`.

    Pixels, targets and order are a function of (seed, index, data, layout): the same for any number of workers, and a
    loader started at step s gives exactly what an uninterrupted one gives from s on.
    Raises ValueError for impossible layouts. Iterating raises SampleError at a damaged image.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        start_step: int,
        total_steps: int,
    ) -> None:
        layout = BatchLayout(micro_batch_size=micro_batch_size, accumulation=accumulation, world=world)
        _check_rank(rank, world)
        _check_classes(index, data)
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step {start_step} must lie between 0 and total_steps {total_steps}")
        batches = _TrainBatches(index, data, seed=seed, layout=layout, rank=rank)
        if micro_batch_size % 2 and batches._mixer.needs_even_batch:
            raise ValueError(f"micro_batch_size is {micro_batch_size}; mixup and cutmix mix pairs, make it even")
        self.layout, self.index = layout, index
        self._numbers = range(start_step * accumulation, total_steps * accumulation)
        self._loader = _loader(batches, self._numbers, data.num_workers)

    def __len__(self) -> int:
        """Micro-batches this loader yields."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self._loader)


class EvalLoader:
    """Every sample of the index exactly once over all ranks: rank r takes r, r + world, ...; no padding, no drop.

    Ranks may have unequal numbers of images and batches (also none): sum counts after the loop, not in it.
    """

    def __init__(self, index: ShardIndex, data: DataConfig, *, batch_size: int, rank: int, world: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        _check_rank(rank, world)
        _check_classes(index, data)
        batches = _EvalBatches(index, data, batch_size=batch_size, rank=rank, world=world)
        count = num_eval_batches(rank, batch_size=batch_size, world=world, num_samples=index.num_samples)
        self.index = index
        self._image_size = data.image_size
        self._numbers = range(count)
        self._loader = _loader(batches, self._numbers, data.num_workers)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._numbers)

    def no_images(self) -> torch.Tensor:
        """A batch of zero images, for a rank that has to keep step with others."""
        return torch.zeros(0, 3, self._image_size, self._image_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self._loader)


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; with world {world} it must lie between 0 and {world - 1}")


def _check_classes(index: ShardIndex, data: DataConfig) -> None:
    if index.num_classes != data.num_classes:
        raise ValueError(f"data.num_classes is {data.num_classes}, but {index.folder} has {index.num_classes} classes; make them equal")


def _loader(batches: Dataset[ImageBatch], numbers: range, num_workers: int) -> DataLoader[ImageBatch]:
    """A DataLoader whose items are whole micro-batches."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_as_is,
        multiprocessing_context="spawn" if num_workers else None,
        persistent_workers=num_workers > 0,
        # Its own generator: DataLoader draws a base seed at every start, which would shift the trainer's random numbers.
        generator=torch.Generator(),
    )


def _as_is(batch: Any) -> Any:
    """Batches come whole: nothing to collate."""
    return batch

"""timm's augmentation for the data room: what it draws, its operations on images, and its mixing. timm is used here and nowhere else in it.

What this file adds: random numbers that depend on a key and not on worker or rank, a shift for small images where there is
no crop, and cheaper steps with the same result bit for bit. `pil` (data/pil_transforms.py) and `fast` (data/fast_transforms.py) share
the draws and the operations between crop and tensor. Shape letters: B images, C channels, H W pixels, V classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as tv

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.mix import MixDraw, soft_targets

PAD_SHARE = 8
"""Small images are padded by image_size / PAD_SHARE before the random crop: 4 pixels for 32, as is usual for CIFAR."""

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Pillow's filter by DataConfig.interpolation."""


class Crop:
    """timm's random resized crop in two steps, so that the box is known before the image is decoded."""

    def __init__(self, crop: RandomResizedCropAndInterpolation, data: DataConfig) -> None:
        self._crop, self._size, self._filter = crop, (data.image_size, data.image_size), FILTERS[data.interpolation]
        self._any_image = torch.zeros(1, 1, 1)

    def draw(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Top, left, height, width as timm draws them; at least one pixel, where timm fails on images of one or two."""
        image = self._any_image.expand(1, height, width)  # has the shape that get_params asks for, and no pixels
        top, left, crop_height, crop_width = self._crop.get_params(image, self._crop.scale, self._crop.ratio)
        return min(top, height - 1), min(left, width - 1), max(crop_height, 1), max(crop_width, 1)

    def cut(self, image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        """The box of `image`, resized."""
        top, left, height, width = box
        # Not resize(box=...): its filter would reach over the edge of the crop.
        return image.crop((left, top, left + width, top + height)).resize(self._size, self._filter)


@dataclass(frozen=True)
class TrainParts:
    """timm's training transform, taken apart."""

    crop: Crop | None
    """None: `shift` instead."""
    shift: Shift
    flip: tv.RandomHorizontalFlip | None
    ops: tuple[Any, ...]
    """From PIL image to PIL image: RandAugment, AutoAugment, colour jitter."""
    erase: RandomErasing | None

    @property
    def draws_from_numpy(self) -> bool:
        """Whether an operation may ask numpy for random numbers (RandAugment does)."""
        return bool(self.ops)


def train_parts(data: DataConfig) -> TrainParts:
    """The parts of timm's training transform of `data.augment`; with crop_scale (1, 1) the crop becomes a shift (pad, random crop)."""
    augment = data.augment
    crop_flip, augment_ops, final = create_transform(
        (3, data.image_size, data.image_size),
        is_training=True,
        scale=augment.crop_scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment or None,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        re_prob=augment.random_erase,
        re_mode="pixel",
        separate=True,
    )
    crop, *flips = crop_flip.transforms
    for operation in _augment_ops(augment_ops.transforms):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = posterize
    return TrainParts(
        crop=Crop(crop, data) if augment.crop_scale != (1.0, 1.0) else None,
        shift=Shift(round(data.image_size / PAD_SHARE)),
        flip=flips[0] if flips else None,
        ops=tuple(augment_ops.transforms),
        erase=next((step for step in final.transforms if isinstance(step, RandomErasing)), None),
    )


def eval_parts(data: DataConfig) -> tuple[tv.Resize, tv.CenterCrop]:
    """timm's resize and crop of evaluation."""
    both = create_transform(
        (3, data.image_size, data.image_size),
        is_training=False,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
    )
    resize, crop, *_ = both.transforms
    return resize, crop


def augmented(image: Image.Image, parts: TrainParts) -> Image.Image:
    """Flipped as drawn, then through the policy's operations."""
    if parts.flip is not None:
        image = parts.flip(image)
    for operation in parts.ops:
        image = operation(image)
    return image


class Shift:
    """Move an image by up to `padding` pixels each way, black behind: the pad-and-random-crop of CIFAR recipes in one step."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def draw(self) -> tuple[int, int]:
        """Left and top of the window in the image."""
        return random.randint(-self.padding, self.padding), random.randint(-self.padding, self.padding)

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = self.draw()
        # Pillow's crop fills what lies outside the image with zeros.
        return image.crop((left, top, left + image.width, top + image.height))


def erase_box(erase: RandomErasing, side: int) -> tuple[int, int, int, int] | None:
    """Top, left, height, width that timm's erasing draws for a square image; None where it leaves the image alone."""
    drawn = _Drawn()
    erase._erase(drawn, 3, side, side, torch.float32)
    if drawn.place is None:
        return None
    _, rows, columns = drawn.place
    return rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start


class _Drawn:
    """Stands where RandomErasing expects an image, and keeps what it would overwrite."""

    place: tuple[slice, slice, slice] | None = None

    def __setitem__(self, place: tuple[slice, slice, slice], pixels: Tensor) -> None:
        self.place = place


def _augment_ops(operations: Iterable[Any]) -> Iterable[AugmentOp]:
    """Every timm AugmentOp inside RandAugment, AutoAugment (a list of lists) or AugMix."""
    for operation in operations:
        if isinstance(operation, AugmentOp):
            yield operation
        elif isinstance(operation, (list, tuple)):
            yield from _augment_ops(operation)
        else:
            yield from _augment_ops(getattr(operation, "ops", getattr(operation, "policy", ())))


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize, also for 0 bits: Pillow 12 gives a black image, Pillow 13 raises (about 1 in 1,000 RandAugment images)."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return timm_posterize(image, bits_to_keep, **options)


class Mixer:
    """timm's mixup and cutmix, group by group: random numbers keyed by (seed, step, group), groups counted within the step.

    A group is `mix_group` neighbours of the stream, so pixels do not depend on the micro-batch; 0: the whole micro-batch.
    A sample is mixed with its mirror in the group.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, seed: int) -> None:
        self._num_classes, self._smoothing, self._seed = num_classes, augment.label_smoothing, seed
        self._group = augment.mix_group
        self._mixup: Mixup | None = None
        if augment.mixes:
            self._mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self._mixup is not None

    def check(self, micro_batch_size: int) -> None:
        """Raises ValueError for a micro-batch that does not consist of whole groups."""
        if self._mixup is None:
            return
        if self._group and micro_batch_size % self._group:
            raise ValueError(
                f"micro_batch_size is {micro_batch_size} and data.augment.mix_group is {self._group}: images of a group are mixed with "
                "one another, so mix_group must divide micro_batch_size"
            )
        if micro_batch_size % 2:
            raise ValueError(f"micro_batch_size is {micro_batch_size}; mixup and cutmix mix pairs, make it even")

    def _groups(self, count: int, in_step: int) -> Sequence[tuple[int, slice]]:
        """(number of the group in its step, its images) of `count` images, the first being image `in_step` of the step."""
        self.check(count)
        size = self._group or count
        return [((in_step + first) // size, slice(first, first + size)) for first in range(0, count, size)]

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int, in_step: int) -> tuple[Tensor, Tensor]:
        """Mixed images (in place) and targets_BV (float32); `in_step`: place of the first image in its step."""
        if self._mixup is None:
            return images_BCHW, soft_targets(labels_B, self._num_classes, self._smoothing)
        targets = []
        with KeyedRandom() as keyed:
            for group, members in self._groups(len(labels_B), in_step):
                keyed.seed_numpy("mix", self._seed, step, group)
                targets.append(self._mixup(images_BCHW[members], labels_B[members])[1])
        return images_BCHW, torch.cat(targets)

    def draw(self, count: int, side: int, *, step: int, in_step: int) -> list[MixDraw]:
        """What `__call__` would draw for `count` square images, group by group."""
        assert self._mixup is not None
        draws = []
        with KeyedRandom() as keyed:
            for group, _ in self._groups(count, in_step):
                keyed.seed_numpy("mix", self._seed, step, group)
                share, is_cutmix = self._mixup._params_per_batch()
                if share != 1.0 and is_cutmix:
                    (top, bottom, left, right), share = cutmix_bbox_and_lam((side, side), share)
                    draws.append(MixDraw(float(share), (int(top), int(bottom), int(left), int(right))))
                else:
                    draws.append(MixDraw(float(share)))
        return draws

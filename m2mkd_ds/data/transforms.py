"""From a decoded image to a normalised tensor, and from a micro-batch to mixed images and soft targets.

The operations are timm's; timm is used here and nowhere else in the data room. What this file adds: random numbers that
depend on a key and not on worker or rank, a shift for small images where there is no crop, and cheaper tensor steps
with the same result bit for bit. Shape letters: B images, C channels, H W pixels, V classes.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms as tv

from m2mkd_ds.config import AugmentConfig, DataConfig

PAD_SHARE = 8
"""Small images are padded by image_size / PAD_SHARE before the random crop: 4 pixels for 32, as is usual for CIFAR."""


class KeyedRandom:
    """Python's, numpy's and torch's CPU random numbers as a function of a key; the caller's streams are restored at exit.

    with KeyedRandom() as keyed:
        keyed.seed("sample", 0, 17)     # from here on, random / numpy.random / torch draw what this key says
    """

    def __enter__(self) -> KeyedRandom:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._torch = torch.default_generator.get_state()
        return self

    def seed(self, purpose: str, *numbers: int) -> None:
        """Start the three generators from (purpose, numbers); numbers are taken modulo 2^64."""
        packed = struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
        digest = hashlib.blake2b(packed, digest_size=28, person=purpose.encode()).digest()
        python_seed, torch_seed, numpy_seed = struct.unpack("<16sQI", digest)
        random.seed(int.from_bytes(python_seed, "little"))
        np.random.seed(numpy_seed)
        # Not torch.manual_seed: before CUDA is initialised that queues one call with its traceback for every image.
        torch.default_generator.manual_seed(torch_seed)

    def __exit__(self, *exc: object) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)


class ImageTransform:
    """RGB image -> normalised float32 [3, H, W]; draws from the global generators, so run it under `KeyedRandom`."""

    def __init__(self, pil_ops: Callable[[Image.Image], Image.Image], data: DataConfig, erase: RandomErasing | None) -> None:
        self.size = data.image_size
        self._pil_ops, self._erase = pil_ops, erase
        self._mean_C11 = torch.tensor(data.mean).view(3, 1, 1)
        self._std_C11 = torch.tensor(data.std).view(3, 1, 1)

    def into(self, image: Image.Image, out_CHW: Tensor) -> None:
        """Transform `image` into `out_CHW` (float32 [3, size, size])."""
        pixels_HWC = torch.from_numpy(np.array(self._pil_ops(image)))
        # The same additions and divisions as timm's ToTensor + Normalize, without their per-image checks and copies.
        out_CHW.copy_(pixels_HWC.permute(2, 0, 1))
        out_CHW.div_(255).sub_(self._mean_C11).div_(self._std_C11)
        if self._erase is not None:
            self._erase(out_CHW)

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform `image` into a new tensor."""
        out_CHW = torch.empty(3, self.size, self.size)
        self.into(image, out_CHW)
        return out_CHW


def train_transform(data: DataConfig) -> ImageTransform:
    """timm's training transform of `data.augment`; with crop_scale (1, 1) the crop becomes a shift (pad, random crop)."""
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
    first, *rest = crop_flip.transforms
    operations = [*([first] if augment.crop_scale != (1.0, 1.0) else _small_image_ops(data)), *rest, *augment_ops.transforms]
    for operation in _augment_ops(operations):
        if operation.aug_fn is timm_posterize:
            operation.aug_fn = posterize
    erase = next((step for step in final.transforms if isinstance(step, RandomErasing)), None)
    return ImageTransform(tv.Compose(operations), data, erase)


def eval_transform(data: DataConfig) -> ImageTransform:
    """timm's evaluation transform: resize the shorter side to image_size / crop_pct, crop the centre, normalise."""
    whole = create_transform(
        (3, data.image_size, data.image_size),
        is_training=False,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
    )
    resize, crop, *_ = whole.transforms
    return ImageTransform(tv.Compose([resize, crop]), data, erase=None)


class Shift:
    """Move an image by up to `padding` pixels each way, black behind: the pad-and-random-crop of CIFAR recipes in one step."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, image: Image.Image) -> Image.Image:
        left = random.randint(-self.padding, self.padding)
        top = random.randint(-self.padding, self.padding)
        # Pillow's crop fills what lies outside the image with zeros.
        return image.crop((left, top, left + image.width, top + image.height))


def _small_image_ops(data: DataConfig) -> list[Any]:
    """Small images: bring them to image_size where they are not, then shift them."""
    side = data.image_size
    resize = tv.Resize((side, side), interpolation=str_to_interp_mode(data.interpolation))
    return [resize, Shift(round(side / PAD_SHARE))]


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


def soft_targets(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Smoothed one-hot targets, float32 [B, V]: 1 - smoothing + smoothing / V at the label, smoothing / V elsewhere.

    timm's Mixup and torch's cross entropy with label_smoothing agree on this definition.
    """
    off = smoothing / num_classes
    return torch.full((len(labels_B), num_classes), off).scatter_(1, labels_B[:, None], 1.0 - smoothing + off)


class Mixer:
    """Mixup / cutmix of a micro-batch and its soft targets, with random numbers keyed by (seed, step, group).

    A sample is mixed with its mirror in the micro-batch, so the pairs are the same for every world size as long as
    the micro-batch size is. Raises ValueError for an odd micro-batch when mixing is on.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, seed: int) -> None:
        self._num_classes, self._smoothing, self._seed = num_classes, augment.label_smoothing, seed
        self._mixup: Mixup | None = None
        if augment.mixup > 0 or augment.cutmix > 0:
            self._mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
            )

    @property
    def needs_even_batch(self) -> bool:
        """Whether images are mixed in pairs."""
        return self._mixup is not None

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int, group: int) -> tuple[Tensor, Tensor]:
        """Mixed images (in place) and targets_BV (float32)."""
        if self._mixup is None:
            return images_BCHW, soft_targets(labels_B, self._num_classes, self._smoothing)
        if len(labels_B) % 2:
            raise ValueError(f"micro-batch of {len(labels_B)} images: mixup and cutmix mix pairs, make micro_batch_size even")
        with KeyedRandom() as keyed:
            keyed.seed("mix", self._seed, step, group)
            return self._mixup(images_BCHW, labels_B)

"""The `pil` path of data.transforms: timm's transforms on Pillow images, bit for bit; `fast` is in data/fast_transforms.py.

The parts and their draws come from data/transforms.py. Shape letters: C channels, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.decode import first_rows, jpeg_head, rgb_image
from m2mkd_ds.data.transforms import FILTERS, augmented, eval_parts, train_parts


class ImageTransform(ABC):
    """RGB image or image file -> normalised float32 [3, H, W], timm's pixels bit for bit.

    Draws from the global generators, so run it under `KeyedRandom`.
    """

    draws_from_numpy = False

    def __init__(self, data: DataConfig) -> None:
        self.size = data.image_size
        self._mean_C11 = torch.tensor(data.mean).view(3, 1, 1)
        self._std_C11 = torch.tensor(data.std).view(3, 1, 1)

    @abstractmethod
    def framed(self, image: Image.Image) -> Image.Image:
        """The part of the image that is wanted, at its size."""

    def framed_file(self, data: bytes) -> Image.Image:
        """As `framed`, from a file. Raises SampleError(kind="undecodable")."""
        return self.framed(rgb_image(data))

    def finish(self, image: Image.Image, out_CHW: Tensor) -> None:
        """From the framed image to `out_CHW`."""
        pixels_HWC = torch.from_numpy(np.array(image))
        # The same additions and divisions as timm's ToTensor + Normalize, without their per-image checks and copies.
        out_CHW.copy_(pixels_HWC.permute(2, 0, 1))
        out_CHW.div_(255).sub_(self._mean_C11).div_(self._std_C11)

    def file_into(self, data: bytes, out_CHW: Tensor) -> None:
        """Decode and transform the bytes of an image file into `out_CHW` (float32 [3, size, size]).

        Raises SampleError(kind="undecodable").
        """
        self.finish(self.framed_file(data), out_CHW)

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform `image` into a new tensor."""
        out_CHW = torch.empty(3, self.size, self.size)
        self.finish(self.framed(image), out_CHW)
        return out_CHW


class _TrainTransform(ImageTransform):
    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.parts = train_parts(data)
        self.draws_from_numpy = self.parts.draws_from_numpy
        self._filter = FILTERS[data.interpolation]

    def framed(self, image: Image.Image) -> Image.Image:
        crop = self.parts.crop
        if crop is None:
            return self.parts.shift(whole(image, self.size, self._filter))
        return crop.cut(image, crop.draw(image.width, image.height))

    def framed_file(self, data: bytes) -> Image.Image:
        crop, head = self.parts.crop, jpeg_head(data)
        if crop is None or head is None:
            return self.framed(rgb_image(data))
        box = crop.draw(head.width, head.height)
        return crop.cut(rgb_image(first_rows(data, head, box[0] + box[2])), box)

    def finish(self, image: Image.Image, out_CHW: Tensor) -> None:
        super().finish(augmented(image, self.parts), out_CHW)
        if self.parts.erase is not None:
            self.parts.erase(out_CHW)


class _EvalTransform(ImageTransform):
    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self._resize, self._crop = eval_parts(data)

    def framed(self, image: Image.Image) -> Image.Image:
        return self._crop(self._resize(image))


def train_transform(data: DataConfig) -> ImageTransform:
    """timm's training transform of `data.augment`; with crop_scale (1, 1) the crop becomes a shift (pad, random crop)."""
    return _TrainTransform(data)


def eval_transform(data: DataConfig) -> ImageTransform:
    """timm's evaluation transform: resize the shorter side to image_size / crop_pct, crop the centre, normalise."""
    return _EvalTransform(data)


def whole(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """The whole image as a square of `side` pixels; itself where it is one."""
    return image if image.size == (side, side) else image.resize((side, side), resample)

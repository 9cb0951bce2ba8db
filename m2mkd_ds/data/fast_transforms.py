"""The `fast` path in a loader worker: image file -> uint8 pixels of the final size, and what remains to be done on the device.

Boxes, flips and the policy's operations are those of the `pil` path, from the same keyed random numbers; decoder and resizing
differ: libjpeg-turbo, at 1/2, 1/4 or 1/8 of the size where the crop is large enough, and torch's vectorised antialiased filter.
Pixels are [H, W, 4] with an idle fourth byte: the filter is a third faster on four-byte pixels than on three-byte ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.decode import JpegHead, first_rows, jpeg_head, pixels_of, rgb_image, rgbx_pixels
from m2mkd_ds.data.transforms import augmented, erase_box, eval_parts, train_parts

SHRINKS = (8, 4, 2)
"""Sizes that libjpeg-turbo decodes faster than the whole; its other fractions are slower."""

NO_ERASE = (0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Drawn:
    """What is left for the device to do with one image."""

    flip: bool
    erase: tuple[int, int, int, int, int]
    """Top, left, height, width of the erased box (empty for none), and the key of its noise (62 bits)."""
    fallback: bool
    """Whether Pillow had to decode it."""


def decode_box(data: bytes, head: JpegHead, box: tuple[int, int, int, int], size: int) -> np.ndarray | None:
    """uint8 [h, w, 4] of a box (top, left, height, width), at the smallest scale that has `size` pixels both ways; None if refused.

    At a reduced scale the box is rounded to whole pixels of that scale: it may be moved by half an output pixel.
    """
    top, left, height, width = box
    shrink = next((s for s in SHRINKS if min(height, width) >= s * size), 1)
    file = first_rows(data, head, top + height, shrink)
    rows = head.height if file is data else int.from_bytes(file[head.height_at : head.height_at + 2], "big")
    # A file whose lower rows are left out has bytes that libjpeg does not expect behind the last row, and says so as a warning.
    pixels = rgbx_pixels(file, min_height=-(-rows // shrink), min_width=-(-head.width // shrink), strict=file is data)
    if pixels is None:
        return None
    if shrink > 1:
        top, left, bottom, right = (round(edge / shrink) for edge in (top, left, top + height, left + width))
        height, width = bottom - top, right - left
    return pixels[top : top + height, left : left + width]


def resize(pixels: np.ndarray, height: int, width: int, mode: str) -> Tensor:
    """uint8 [height, width, 4] of uint8 [h, w, 4], antialiased."""
    if pixels.shape[:2] == (height, width):
        return torch.from_numpy(np.ascontiguousarray(pixels))
    # Contiguous first: from a view into a larger image the filter takes a path that is half as fast.
    image_1CHW = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return interpolate(image_1CHW, (height, width), mode=mode, antialias=True)[0].permute(1, 2, 0)


class FastTrain:
    """One training image; draws from the global generators, so run it under `KeyedRandom`."""

    def __init__(self, data: DataConfig) -> None:
        self.size, self._mode = data.image_size, data.interpolation
        self.parts = train_parts(data)
        self.draws_from_numpy = self.parts.draws_from_numpy
        # Operations of a policy may turn the image: with them the flip has to come first, and is done here.
        self._flip_p = self.parts.flip.p if self.parts.flip is not None and not self.parts.ops else None

    def file_into(self, data: bytes, out_HW4: Tensor) -> Drawn:
        """Decode, frame and augment the bytes of an image file into `out_HW4` (uint8). Raises SampleError(kind="undecodable")."""
        fallback = self._frame_into(data, out_HW4)
        flip = self._flip_p is not None and bool(torch.rand(1) < self._flip_p)
        if self.parts.ops:
            image = Image.frombytes("RGB", (self.size, self.size), out_HW4.numpy().tobytes(), "raw", "RGBX")
            out_HW4.copy_(torch.from_numpy(pixels_of(augmented(image, self.parts)).copy()))
        box = erase_box(self.parts.erase, self.size) if self.parts.erase is not None else None
        return Drawn(flip, (*box, random.getrandbits(62)) if box else NO_ERASE, fallback)

    def _frame_into(self, data: bytes, out_HW4: Tensor) -> bool:
        """Returns whether Pillow had to decode."""
        head, size, crop = jpeg_head(data), self.size, self.parts.crop
        pixels = None
        if crop is None:
            pixels, fallback = _all_pixels(data, head, size, size)
            moved_HW4 = resize(pixels, size, size, self._mode)
            _shift_into(moved_HW4, *self.parts.shift.draw(), out_HW4)
            return fallback
        if head is not None:
            box = crop.draw(head.width, head.height)
            pixels = decode_box(data, head, box, size)
        fallback = pixels is None
        if pixels is None:
            image = rgb_image(data)
            if head is None:
                box = crop.draw(image.width, image.height)
            top, left, height, width = box
            pixels = pixels_of(image.crop((left, top, left + width, top + height)))
        out_HW4.copy_(resize(pixels, size, size, self._mode))
        return fallback


class FastEval:
    """One evaluation image."""

    def __init__(self, data: DataConfig) -> None:
        self.size, self._mode = data.image_size, data.interpolation
        self._short = int(eval_parts(data)[0].size)

    def file_into(self, data: bytes, out_HW4: Tensor) -> Drawn:
        """Decode, resize and crop the bytes of an image file into `out_HW4` (uint8). Raises SampleError(kind="undecodable")."""
        pixels, fallback = _all_pixels(data, jpeg_head(data), self._short, self._short)
        height, width = pixels.shape[:2]
        # torchvision's Resize: the shorter side exactly, the longer one rounded down.
        short, long = self._short, self._short * max(height, width) // min(height, width)
        new_height, new_width = (short, long) if height <= width else (long, short)
        resized_HW4 = resize(pixels, new_height, new_width, self._mode)
        top, left = (round((side - self.size) / 2.0) for side in (new_height, new_width))
        out_HW4.copy_(resized_HW4[top : top + self.size, left : left + self.size])
        return Drawn(False, NO_ERASE, fallback)


def _all_pixels(data: bytes, head: JpegHead | None, height: int, width: int) -> tuple[np.ndarray, bool]:
    """uint8 [h, w, 4] of the whole image, not smaller than asked where it is not smaller itself, and whether Pillow had to decode."""
    if head is not None:
        pixels = decode_box(data, head, (0, 0, head.height, head.width), max(height, width))
        if pixels is not None:
            return pixels, False
    return pixels_of(rgb_image(data)), True


def _shift_into(image_HW4: Tensor, left: int, top: int, out_HW4: Tensor) -> None:
    """The image seen from (left, top), black behind it."""
    height, width = image_HW4.shape[:2]
    out_HW4.zero_()
    rows, columns = slice(max(top, 0), min(height + top, height)), slice(max(left, 0), min(width + left, width))
    to_rows, to_columns = (slice(max(-by, 0), max(-by, 0) + s.stop - s.start) for by, s in ((top, rows), (left, columns)))
    out_HW4[to_rows, to_columns] = image_HW4[rows, columns]

"""The `fast` path in a loader worker: image file -> uint8 pixels of the final size, and what remains to be done on the device.

Boxes, flips and the policy's operations are those of the `pil` path, from the same keyed random numbers; decoder and resizing
differ: libjpeg-turbo, at 1/2, 1/4 or 1/8 of the size where the crop is large enough, and torch's vectorised antialiased filter.
Shape letters: H W pixels of the result, h w of a crop, C channels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.decode import JpegHead, first_rows, jpeg_head, pixels_of, rgb_image, rgb_pixels
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


class BoxDecoder:
    """Decodes boxes of JPEGs, time and again into the same memory: fresh memory for every image costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, data: bytes, head: JpegHead, box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray | None:
        """uint8 [h, w, 3] of a box (top, left, height, width), at the smallest scale that has `height` x `width` pixels in it.

        None where libjpeg-turbo refuses the file. Valid until the next call. At a reduced scale the box is rounded to whole pixels of
        that scale: it may be moved by half an output pixel.
        """
        top, left, box_height, box_width = box
        shrink = next((s for s in SHRINKS if box_height >= s * height and box_width >= s * width), 1)
        file = first_rows(data, head, top + box_height, shrink)
        rows = head.height if file is data else int.from_bytes(file[head.height_at : head.height_at + 2], "big")
        min_height, min_width = -(-rows // shrink), -(-head.width // shrink)
        if self._memory.size < 3 * min_height * min_width:
            self._memory = np.empty(3 * min_height * min_width, np.uint8)
        # A file whose lower rows are left out has bytes that libjpeg does not expect behind the last row: it says so as a warning.
        pixels = rgb_pixels(file, min_height=min_height, min_width=min_width, strict=file is data, memory=self._memory)
        if pixels is None:
            return None
        top, left, bottom, right = (round(edge / shrink) for edge in (top, left, top + box_height, left + box_width))
        return pixels[top:bottom, left:right]


def resize_into(pixels: np.ndarray, out_HWC: Tensor, mode: str) -> None:
    """uint8 [h, w, 3] -> uint8 [H, W, 3], antialiased. `out_HWC` is contiguous."""
    # A copy of the crop with the strides of a channels-last batch: from and to any other layout the filter is half as fast.
    crop_hwC = torch.from_numpy(np.ascontiguousarray(pixels))
    if crop_hwC.shape == out_HWC.shape:
        out_HWC.copy_(crop_hwC)
        return
    source_1Chw, out_1CHW = (image.view(1, *image.shape).permute(0, 3, 1, 2) for image in (crop_hwC, out_HWC))
    # What torch.nn.functional.interpolate(antialias=True) calls, which cannot write into memory that is there.
    _FILTERS[mode](source_1Chw, out_HWC.shape[:2], False, out=out_1CHW)


_FILTERS = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa.out, "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out}


class FastTrain:
    """One training image; draws from the global generators, so run it under `KeyedRandom`."""

    def __init__(self, data: DataConfig) -> None:
        self.size, self._mode = data.image_size, data.interpolation
        self.parts = train_parts(data)
        self.draws_from_numpy = self.parts.draws_from_numpy
        # Operations of a policy may turn the image: with them the flip has to come first, and is done here.
        self._decode_box = BoxDecoder()
        self._flip_p = self.parts.flip.p if self.parts.flip is not None and not self.parts.ops else None

    def file_into(self, data: bytes, out_HWC: Tensor) -> Drawn:
        """Decode, frame and augment the bytes of an image file into `out_HWC` (uint8). Raises SampleError(kind="undecodable")."""
        fallback = self._crop_into(data, out_HWC) if self.parts.crop is not None else self._shift_into(data, out_HWC)
        flip = self._flip_p is not None and bool(torch.rand(1) < self._flip_p)
        if self.parts.ops:
            framed = Image.frombytes("RGB", (self.size, self.size), out_HWC.numpy().tobytes())
            out_HWC.copy_(torch.from_numpy(pixels_of(augmented(framed, self.parts))))
        box = erase_box(self.parts.erase, self.size) if self.parts.erase is not None else None
        return Drawn(flip, (*box, random.getrandbits(62)) if box else NO_ERASE, fallback)

    def _crop_into(self, data: bytes, out_HWC: Tensor) -> bool:
        """Returns whether Pillow had to decode."""
        assert self.parts.crop is not None
        head = jpeg_head(data)
        if head is not None:
            box = self.parts.crop.draw(head.width, head.height)
            pixels = self._decode_box(data, head, box, self.size, self.size)
            if pixels is not None:
                resize_into(pixels, out_HWC, self._mode)
                return False
        image = rgb_image(data)
        top, left, height, width = box if head is not None else self.parts.crop.draw(*image.size)
        resize_into(pixels_of(image.crop((left, top, left + width, top + height))), out_HWC, self._mode)
        return True

    def _shift_into(self, data: bytes, out_HWC: Tensor) -> bool:
        """Returns whether Pillow had to decode."""
        pixels, fallback = _all_pixels(self._decode_box, data)
        whole_HWC = torch.empty_like(out_HWC)
        resize_into(pixels, whole_HWC, self._mode)
        _shift(whole_HWC, *self.parts.shift.draw(), out_HWC)
        return fallback


class FastEval:
    """One evaluation image."""

    def __init__(self, data: DataConfig) -> None:
        self.size, self._mode = data.image_size, data.interpolation
        self._short = int(eval_parts(data)[0].size)
        self._decode_box = BoxDecoder()

    def file_into(self, data: bytes, out_HWC: Tensor) -> Drawn:
        """Decode, resize and crop the bytes of an image file into `out_HWC` (uint8). Raises SampleError(kind="undecodable")."""
        pixels, fallback = _all_pixels(self._decode_box, data)
        height, width = pixels.shape[:2]
        # torchvision's Resize: the shorter side exactly, the longer one rounded down.
        short, long = self._short, self._short * max(height, width) // min(height, width)
        new_height, new_width = (short, long) if height <= width else (long, short)
        resized_HWC = torch.empty(new_height, new_width, 3, dtype=torch.uint8)
        resize_into(pixels, resized_HWC, self._mode)
        top, left = (round((side - self.size) / 2.0) for side in (new_height, new_width))
        out_HWC.copy_(resized_HWC[top : top + self.size, left : left + self.size])
        return Drawn(False, NO_ERASE, fallback)


def _all_pixels(decode_box: BoxDecoder, data: bytes) -> tuple[np.ndarray, bool]:
    """uint8 [H, W, 3] of the whole image, and whether Pillow had to decode. At full scale: a score must not depend on a short cut."""
    head = jpeg_head(data)
    if head is not None:
        pixels = decode_box(data, head, (0, 0, head.height, head.width), head.height, head.width)
        if pixels is not None:
            return pixels, False
    return pixels_of(rgb_image(data)), True


def _shift(image_HWC: Tensor, left: int, top: int, out_HWC: Tensor) -> None:
    """The image seen from (left, top), black behind it."""
    height, width = image_HWC.shape[:2]
    out_HWC.zero_()
    rows, columns = slice(max(top, 0), min(height + top, height)), slice(max(left, 0), min(width + left, width))
    to_rows, to_columns = (slice(max(-by, 0), max(-by, 0) + s.stop - s.start) for by, s in ((top, rows), (left, columns)))
    out_HWC[to_rows, to_columns] = image_HWC[rows, columns]

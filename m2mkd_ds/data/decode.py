"""From the bytes of an image file to pixels: Pillow for everything, libjpeg-turbo (simplejpeg) for JPEGs where speed is asked for.

A training crop seldom reaches the last row of an image, and the entropy-coded rows of a JPEG cannot be skipped but may be left
unread. `first_rows` hands a decoder the same file with a smaller height in its frame header: the rows above are the same bits,
those below are not decoded. It is used only for files that end as a JPEG must, so a file that was cut off is still found.

What is wrong with bytes is raised as SampleError(kind="undecodable"); Pillow's verdict decides.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.index import ShardIndex

UNDECODABLE = (
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
    OverflowError, MemoryError, zlib.error, struct.error,
)  # fmt: skip
"""What Pillow raises for damaged files, format by format."""

_END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers without a length behind them."""
_FRAMES = {0xC0: True, 0xC1: True, 0xC2: False}
"""Huffman-coded 8-bit frames -> whether rows come from top to bottom (a progressive file has all rows in its last scan)."""


@dataclass(frozen=True)
class JpegHead:
    """What the frame header says."""

    width: int
    height: int
    num_components: int
    mcu_rows: int
    """Pixel rows of a row of coding units: 8 or 16, rarely 32."""
    height_at: int
    """Offset of the height's two bytes."""
    can_end_early: bool
    """Whether the rows above may be decoded without those below."""


def jpeg_head(data: bytes) -> JpegHead | None:
    """The head of a JPEG that libjpeg-turbo may decode; None for another format, an odd or damaged one: Pillow's then."""
    if data[:2] != b"\xff\xd8":
        return None
    at, size = 2, len(data)
    while at + 10 < size:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding before a marker
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        if marker in _FRAMES:
            return _frame(data, at, in_order=_FRAMES[marker])
        if marker == _START_OF_SCAN or 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _frame(data: bytes, at: int, *, in_order: bool) -> JpegHead | None:
    bits, height, width, num_components = struct.unpack_from(">BHHB", data, at + 4)
    factors = data[at + 11 : at + 10 + 3 * num_components : 3]
    if bits != 8 or not height or not width or len(factors) != num_components or num_components not in (1, 3):
        return None
    if width * height > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    # One component is coded block by block, whatever its factors say.
    mcu_rows = 8 * (max(factor & 15 for factor in factors) if num_components > 1 else 1)
    can_end_early = in_order and data.endswith(_END_OF_IMAGE)
    return JpegHead(width, height, num_components, mcu_rows, at + 5, can_end_early)


def first_rows(data: bytes, head: JpegHead, rows: int, shrink: int = 1) -> bytes | bytearray:
    """The file with a height that still gives the first `rows` rows exactly, also when decoded at 1 / `shrink`.

    `data` itself where nothing is saved or the rows depend on all of the file.
    """
    # The row below and its neighbour share colour samples with the last one: keep two more rows of samples.
    needed = rows + (head.mcu_rows // 8) * 2 * shrink
    saved = head.height // head.mcu_rows - -(-needed // head.mcu_rows)
    if saved < 1 or not head.can_end_early:
        return data
    shorter = bytearray(data)
    struct.pack_into(">H", shorter, head.height_at, needed)
    return shorter


def rgb_image(data: bytes | bytearray) -> Image.Image:
    """Pillow's RGB image, decoded; grey is repeated, transparency dropped, EXIF orientation ignored (as timm's readers do).

    Raises SampleError(kind="undecodable") for damaged bytes.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()  # convert() would copy
        return image
    except UNDECODABLE as err:
        raise SampleError(f"cannot decode the image ({type(err).__name__}: {err})", "undecodable") from err


def rgb_pixels(
    data: bytes | bytearray, *, min_height: int = 0, min_width: int = 0, strict: bool = True, memory: np.ndarray | None = None
) -> np.ndarray | None:
    """uint8 [H, W, 3] by libjpeg-turbo; None where it refuses the file. `memory` (uint8, large enough) is written to, if given.

    With `min_height` and `min_width`: decoded at the smallest size (a multiple of 1/8) that is not below them. Without `strict`,
    what libjpeg calls a warning is let pass, as Pillow does always.
    """
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=min_height, min_width=min_width, strict=strict, buffer=memory)
    except ValueError:
        return None


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of an RGB image."""
    return np.array(image)


def decode(index: ShardIndex, sample: int) -> tuple[Image.Image, int]:
    """RGB image and label of a sample. Raises SampleError (shard, key, sample) for damaged bytes."""
    data, label, _ = index.read(sample)
    try:
        return rgb_image(data), label
    except SampleError as err:
        raise SampleError(f"{index.describe(sample)}: {err}", err.kind) from err

"""Smaller copies of large photos, for shards that take less disk and decode faster.

Only an image whose shorter side is larger than asked for is touched; no image is ever enlarged. What the loader would have seen
decides: it decodes with Pillow and converts to RGB, so

- the EXIF orientation is not applied to the pixels. The tag itself is kept, so a viewer that obeys it shows the same picture as before.
- CMYK and YCCK are converted to RGB by Pillow; the colour profile of the four inks would be wrong then and is left out. Otherwise it stays.
- transparency (RGBA, LA, palette entries) is dropped as `convert("RGB")` drops it, not laid on a background.
- a palette is resolved before the image is resized: indices cannot be averaged.
- grey stays grey; more than 8 bits a channel are refused, because no choice of their range would be right for all.

The result is a JPEG; its bytes depend on the versions of Pillow and its libjpeg.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from m2mkd_ds.data.decode import UNDECODABLE
from m2mkd_ds.data.errors import ShardError

ORIENTATION = 0x0112
"""The EXIF tag."""
GREY_MODES = ("1", "L")
COLOUR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "P", "PA", "LA", "La", "RGBa", "LAB", "HSV")


@dataclass(frozen=True)
class Reencoder:
    """Bring the shorter side down to `resize_short` pixels and write a JPEG of `quality` (1 to 100)."""

    resize_short: int
    quality: int

    def __post_init__(self) -> None:
        if self.resize_short < 1 or not 1 <= self.quality <= 100:
            raise ShardError(
                f"resize_short is {self.resize_short} and quality is {self.quality}; allowed are at least 1 pixel and a quality of 1 to 100"
            )

    def __call__(self, data: bytes, extension: str) -> tuple[bytes, str]:
        """(bytes, extension) of the smaller copy, or those given when the shorter side is no larger than asked for.

        Raises ShardError when the data is no image that can be decoded; the caller knows the file's name.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:
                if min(image.size) <= self.resize_short:
                    return data, extension
                return self._smaller(image), "jpg"
        except ShardError:
            raise
        except UNDECODABLE as err:
            raise ShardError(f"not an image that can be decoded ({err})") from err

    def _smaller(self, image: Image.Image) -> bytes:
        if image.mode not in GREY_MODES + COLOUR_MODES:
            raise ShardError(f"has pixels of kind {image.mode}, more than 8 bits a channel; convert it to 8 bits")
        orientation = image.getexif().get(ORIENTATION, 1)
        profile = None if image.mode in ("CMYK", "LAB") else image.info.get("icc_profile")
        plain = image.convert("L" if image.mode in GREY_MODES else "RGB")
        short = min(plain.size)
        width, height = (self.resize_short if side == short else round(side * self.resize_short / short) for side in plain.size)
        exif = Image.Exif()
        if orientation != 1:
            exif[ORIENTATION] = orientation
        file = io.BytesIO()
        small = plain.resize((width, height), Image.Resampling.LANCZOS)
        small.save(file, format="JPEG", quality=self.quality, exif=exif.tobytes() if orientation != 1 else b"", icc_profile=profile)
        return file.getvalue()

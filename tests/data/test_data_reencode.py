"""Facts of making images smaller: who is touched, which size results, and that the loader sees the same picture as before."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.shards.reencode import Reencoder
from m2mkd_ds.data.sources.registry import make_source

GRADIENT_HW = np.add.outer(np.arange(60), 2 * np.arange(90)).astype(np.uint8)
"""60 high, 90 wide, values 0 to 237; smooth, so that JPEG keeps it."""


def encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def as_the_loader_sees(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode, convert, then make smaller by averaging: another order of steps and another filter than the code's."""
    return np.asarray(opened(data).convert("RGB").resize(size, Image.Resampling.BOX), dtype=float)


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((90, 60), 30, (45, 30)),
        ((60, 90), 30, (30, 45)),
        ((91, 60), 40, (61, 40)),  # 91 * 40 / 60 = 60.67
        ((60, 60), 59, (59, 59)),
        ((61, 60), 60, None),  # the shorter side is not larger
        ((90, 20), 30, None),  # never enlarged
    ],
)
def test_the_shorter_side_becomes_what_was_asked_for(size: tuple[int, int], short: int, expected: tuple[int, int] | None) -> None:
    data = encoded(Image.new("RGB", size, (10, 200, 30)), "PNG")
    smaller, extension = Reencoder(short, 90)(data, "png")
    if expected is None:
        assert (smaller, extension) == (data, "png")
    else:
        assert (opened(smaller).size, opened(smaller).format, extension) == (expected, "JPEG", "jpg")
        assert np.abs(np.asarray(opened(smaller), dtype=int) - (10, 200, 30)).max() <= 3


def test_quality_is_passed_on() -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise_HWC), "PNG")
    low, high = (Reencoder(60, quality)(data, "png")[0] for quality in (30, 95))
    # The first value of the luminance table: libjpeg scales 16 by 5000/30 % = 27, and by (200 - 2 * 95) % = 2.
    assert (opened(low).quantization[0][0], opened(high).quantization[0][0]) == (27, 2)
    assert len(low) < len(high) / 2


def with_transparent_hole() -> Image.Image:
    image = Image.fromarray(GRADIENT_HW).convert("RGBA")
    alpha_HW = np.full((60, 90), 255, np.uint8)
    alpha_HW[20:40, 20:40] = 0
    image.putalpha(Image.fromarray(alpha_HW))
    return image


GREY = Image.fromarray(GRADIENT_HW)
KINDS: dict[str, tuple[bytes, str]] = {
    "grey": (encoded(GREY, "PNG"), "L"),
    "two levels": (encoded(GREY.point(lambda value: 255 * (value > 100)).convert("1"), "PNG"), "L"),
    "cmyk": (encoded(GREY.convert("RGB").convert("CMYK"), "JPEG", quality=95), "RGB"),
    "alpha": (encoded(with_transparent_hole(), "PNG"), "RGB"),
    "grey with alpha": (encoded(with_transparent_hole().convert("LA"), "PNG"), "RGB"),
    "palette": (encoded(GREY.convert("RGB").quantize(64), "PNG"), "RGB"),
    "palette with a hole": (encoded(GREY.convert("RGB").quantize(64), "PNG", transparency=3), "RGB"),
    "webp": (encoded(GREY.convert("RGB"), "WEBP", lossless=True), "RGB"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_sees_the_same_picture_made_smaller(kind: str) -> None:
    data, mode = KINDS[kind]
    smaller, _ = Reencoder(30, 95)(data, "x")
    assert (opened(smaller).mode, opened(smaller).size) == (mode, (45, 30))
    difference = np.abs(as_the_loader_sees(smaller, (45, 30)) - as_the_loader_sees(data, (45, 30)))
    # A transparent hole shows the colours below it, not black or white: that would differ by 100 and more.
    assert np.mean(difference) < 3
    assert np.quantile(difference, 0.95) < (60 if kind == "two levels" else 12)


def test_orientation_is_kept_as_a_tag_and_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter when shown
    exif[0x010F] = "maker"
    data = encoded(GREY, "JPEG", exif=exif.tobytes(), quality=95)
    image = opened(Reencoder(30, 95)(data, "jpg")[0])
    assert image.size == (45, 30)
    assert dict(image.getexif()) == {0x0112: 6}
    assert np.abs(np.asarray(image, dtype=float) - as_the_loader_sees(data, (45, 30))[:, :, 0]).mean() < 3
    assert not opened(Reencoder(30, 95)(encoded(GREY, "JPEG"), "jpg")[0]).getexif()


def test_a_colour_profile_stays_with_its_colours() -> None:
    rgb, cmyk = GREY.convert("RGB"), GREY.convert("RGB").convert("CMYK")
    assert opened(Reencoder(30, 90)(encoded(rgb, "JPEG", icc_profile=b"profile"), "jpg")[0]).info["icc_profile"] == b"profile"
    assert "icc_profile" not in opened(Reencoder(30, 90)(encoded(cmyk, "JPEG", icc_profile=b"profile"), "jpg")[0]).info


def test_what_cannot_be_made_smaller_is_refused() -> None:
    deep = encoded(Image.fromarray(GRADIENT_HW.astype(np.uint16) * 200), "PNG")
    with pytest.raises(ShardError, match="pixels of kind I;16, more than 8 bits"):
        Reencoder(30, 90)(deep, "png")
    whole = encoded(GREY, "JPEG")
    for damaged in (b"", b"no image", whole[:-300], encoded(GREY, "PNG")[:-200]):
        with pytest.raises(ShardError, match="not an image that can be decoded"):
            Reencoder(30, 90)(damaged, "jpg")


def test_writing_names_the_file_that_cannot_be_decoded(tmp_path: Path) -> None:
    for name, data in (("a.jpg", encoded(GREY, "JPEG")), ("b.jpg", encoded(GREY, "JPEG")[:-300]), ("c.png", b"text")):
        (tmp_path / "set" / "train" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "train" / "cat" / name).write_bytes(data)
    (tmp_path / "set" / "val" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "val" / "cat" / "v.jpg").write_bytes(encoded(GREY, "JPEG"))
    for name in ("b.jpg", "c.png"):
        with pytest.raises(ShardError, match=r"set/train/cat/[bc]\....: not an image that can be decoded .*leave out --resize-short"):
            make_source("image_folder", tmp_path / f"out-{name}", path=tmp_path / "set", resize_short=30)
        (tmp_path / "set" / "train" / "cat" / name).unlink()
    train, _ = make_source("image_folder", tmp_path / "out", path=tmp_path / "set", resize_short=30, quality=80)
    assert (train.request["resize_short"], train.request["quality"]) == (30, 80)
    assert opened(train.read(0)[0]).size == (45, 30)
    for other in ({"resize_short": 40, "quality": 80}, {"resize_short": 30, "quality": 90}, {}):
        with pytest.raises(ShardError, match="holds other shards, they differ in .*(resize_short|quality)"):
            make_source("image_folder", tmp_path / "out", path=tmp_path / "set", **other)

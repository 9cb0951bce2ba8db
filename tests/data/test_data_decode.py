"""Facts of decoding: a shortened JPEG gives the same rows, odd files go the way that Pillow decides, `fast` is close to `pil`."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.decode import first_rows, jpeg_head, rgb_image, rgb_pixels
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.fast_transforms import FastEval, FastTrain
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.pil_transforms import eval_transform, train_transform

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
"""scikit-learn's two photos, 640 x 427."""


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def encoded(image: Image.Image, subsampling: str) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.array(image)), 90, "RGB", subsampling)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_a_shortened_jpeg_has_the_same_first_rows_in_both_decoders(subsampling: str) -> None:
    draw = random.Random(subsampling)
    shortened = 0
    for number in range(12):
        image = PHOTOS[number % 2].crop((0, 0, draw.randint(17, 300), draw.randint(40, 300)))
        data = encoded(image, subsampling)
        head, rows = jpeg_head(data), draw.randint(1, image.height)
        assert head is not None and (head.width, head.height) == image.size
        file = first_rows(data, head, rows)
        shortened += file is not data
        whole = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(np.array(rgb_image(file))[:rows], whole[:rows])
        pixels = rgb_pixels(file, strict=False)
        assert pixels is not None and np.array_equal(pixels[:rows], whole[:rows])
    assert shortened > 3


def test_files_that_cannot_end_early_are_left_whole() -> None:
    data = jpeg(PHOTOS[0])
    for whole in (jpeg(PHOTOS[0], progressive=True), data[:-2], data + b"\0"):
        head = jpeg_head(whole)
        assert head is not None and first_rows(whole, head, 20) is whole
    head = jpeg_head(data)
    assert head is not None and first_rows(data, head, 20) is not data and first_rows(data, head, 427) is data


def files() -> dict[str, tuple[bytes, bool]]:
    """Odd files of ImageNet's kinds, and whether `fast` has to ask Pillow."""
    photo = PHOTOS[0].resize((80, 60))
    png = io.BytesIO()
    photo.save(png, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    return {
        "png named jpg": (png.getvalue(), True),
        "cmyk": (jpeg(photo.convert("CMYK")), True),
        "grey": (jpeg(photo.convert("L")), False),
        "exif": (jpeg(photo, exif=exif), False),
        "progressive": (jpeg(photo, progressive=True), False),
        "one pixel": (jpeg(photo.resize((1, 1))), False),
        "narrow": (jpeg(photo.resize((3, 90))), False),
        "restart markers": (jpeg(photo, restart_marker_rows=1), False),
        "bytes behind the end": (jpeg(photo) + b"rest", False),
    }


@pytest.mark.parametrize("name", files())
def test_odd_files_are_the_same_image_on_both_paths(name: str) -> None:
    data, fallback = files()[name]
    config = DataConfig(image_size=32, augment=AugmentConfig(hflip=0.0), mean=(0, 0, 0), std=(1, 1, 1))
    pil, fast, out_HWC = train_transform(config), FastTrain(config), torch.empty(32, 32, 3, dtype=torch.uint8)
    pil_CHW = torch.empty(3, 32, 32)
    with KeyedRandom() as keyed:
        for number in range(10):
            keyed.seed("sample", number)
            pil.file_into(data, pil_CHW)
            keyed.seed("sample", number)
            assert fast.file_into(data, out_HWC).fallback == fallback
            # A pixel is a step of 1/255; Pillow's and torch's filters round differently by one or two.
            assert float((out_HWC.permute(2, 0, 1) / 255 - pil_CHW).abs().max()) < 2.5 / 255
    assert FastEval(config).file_into(data, out_HWC).fallback == fallback
    if name == "exif":  # ignored, as timm's ImageFolder ignores it: the wide image stays wide
        assert rgb_image(data).size == (80, 60)


def test_damaged_files_are_bad_on_both_paths() -> None:
    data = jpeg(PHOTOS[1])
    png = io.BytesIO()
    PHOTOS[1].save(png, "PNG")
    config = DataConfig(image_size=224, augment=AugmentConfig(crop_scale=(0.9, 1.0)))
    out_CHW, out_HWC = torch.empty(3, 224, 224), torch.empty(224, 224, 3, dtype=torch.uint8)
    for damaged in (data[: len(data) // 2], data[:300], data[:1], b"", b"\xff\xd8", png.getvalue()[:5000], b"no image"):
        for file_into in (
            lambda d: train_transform(config).file_into(d, out_CHW),
            lambda d: FastTrain(config).file_into(d, out_HWC),
            lambda d: eval_transform(config).file_into(d, out_CHW),
            lambda d: FastEval(config).file_into(d, out_HWC),
        ):
            with pytest.raises(SampleError, match="cannot decode the image") as caught:
                file_into(damaged)
            assert caught.value.kind == "undecodable"


def psnr(left_HWC: np.ndarray, right_HWC: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((left_HWC.astype(float) - right_HWC) ** 2)))


def pixels_of_both(scale: int, *, evaluation: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same crops of photos enlarged `scale` times, by Pillow and by the fast path; uint8 [224, 224, 3]."""
    config = DataConfig(augment=AugmentConfig(hflip=0.0), mean=(0, 0, 0), std=(1, 1, 1))
    pil = eval_transform(config) if evaluation else train_transform(config)
    fast = FastEval(config) if evaluation else FastTrain(config)
    pairs = []
    for number in range(12):
        photo = PHOTOS[number % 2]
        data = jpeg(photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.BICUBIC))
        out_CHW, out_HWC = torch.empty(3, 224, 224), torch.empty(224, 224, 3, dtype=torch.uint8)
        with KeyedRandom() as keyed:
            keyed.seed("sample", number)
            pil.file_into(data, out_CHW)
            keyed.seed("sample", number)
            fast.file_into(data, out_HWC)
        pairs.append(((out_CHW * 255).round().permute(1, 2, 0).numpy(), out_HWC.numpy()))
    return pairs


@pytest.mark.parametrize(("scale", "evaluation"), [(1, False), (1, True), (3, True)])
def test_fast_pixels_of_photos_differ_by_rounding_where_the_whole_size_is_decoded(scale: int, evaluation: bool) -> None:
    for pil_HWC, fast_HWC in pixels_of_both(scale, evaluation=evaluation):
        difference = np.abs(pil_HWC - fast_HWC)
        assert difference.max() <= 2 and difference.mean() < 0.05 and psnr(pil_HWC, fast_HWC) > 60


def test_fast_pixels_of_large_photos_are_close() -> None:
    # 1,920 x 1,281: most crops are decoded at 1/2 or 1/4, and moved by up to half a pixel of that scale.
    pairs = pixels_of_both(3)
    assert all(psnr(*pair) > 25 and np.abs(pair[0] - pair[1]).mean() < 6 for pair in pairs)
    assert np.median([psnr(*pair) for pair in pairs]) > 30

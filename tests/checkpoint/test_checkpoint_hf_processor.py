"""The image processor of an exported folder: the evaluation transform's pixels, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from m2mkd_ds.checkpoint.hf.config import data_from_processor, processor_config
from m2mkd_ds.data.pil_transforms import eval_transform
from tests.checkpoint.exported_models import ARCH, DATA, NAMES, export, make_model

# (image_size, crop_pct, filter, height and width of the image). In cases 3 and 4 the margins to crop are odd: (40 - 35) / 2 = 2.5 and
# (47 - 28) / 2 = 9.5, rounded to 2 and 10; in case 5 the image is smaller than the crop, in case 6 resizing has nothing to do.
CASES = [
    (28, 1.0, "bicubic", (28, 28)),
    (28, 0.875, "bicubic", (40, 51)),
    (32, 0.8, "bilinear", (72, 64)),
    (35, 0.875, "bicubic", (71, 71)),
    (28, 0.875, "bicubic", (64, 95)),
    (32, 0.9, "bicubic", (9, 14)),
    (28, 0.875, "bilinear", (32, 45)),
]


def picture(shape: tuple[int, int], mode: str) -> Image.Image:
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, *channels), dtype=np.uint8))


def processor_of(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.usefixtures("code_cache")
def test_the_image_processor_is_timms_evaluation_transform(
    case: tuple[int, float, Any, tuple[int, int]], mode: str, tmp_path: Path
) -> None:
    size, crop_pct, interpolation, shape = case
    data = dataclasses.replace(DATA, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
    model = make_model(dataclasses.replace(ARCH, image_size=size, patch_size={28: 7, 32: 8, 35: 7}[size]))
    processor = processor_of(export(model, tmp_path / "out", data=data))
    image = picture(shape, mode)
    oracle = create_transform(size, is_training=False, mean=data.mean, std=data.std, crop_pct=crop_pct, interpolation=interpolation)
    want = oracle(image.convert("RGB"))
    given = processor(image, return_tensors="pt")["pixel_values"]
    assert given.shape == (1, 3, size, size) and given.dtype == torch.float32
    assert torch.equal(given[0], want)
    assert torch.equal(given[0], eval_transform(data)(image.convert("RGB")))


@pytest.mark.usefixtures("code_cache")
def test_every_kind_of_image_gives_the_same_pixels(tmp_path: Path) -> None:
    processor = processor_of(export(make_model(), tmp_path / "out"))
    image = picture((40, 51), "RGB")
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    want = processor(image, return_tensors="pt")["pixel_values"]
    kinds = {
        "array": array, "channels first": array.transpose(2, 0, 1).copy(), "floats": array.astype(np.float32) / 255,
        "tensor": torch.tensor(array).permute(2, 0, 1), "path": str(tmp_path / "image.png"), "list": [image],
    }  # fmt: skip
    for name, kind in kinds.items():
        assert torch.equal(processor(kind, return_tensors="pt")["pixel_values"], want), name
    two = processor([image, array], return_tensors="np")["pixel_values"]
    assert two.shape == (2, 3, 28, 28) and np.array_equal(two[0], two[1]) and np.array_equal(two[0], want[0].numpy())


@pytest.mark.usefixtures("code_cache")
def test_steps_can_be_switched_off_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    processor = processor_of(export(make_model(), tmp_path / "out"))
    image = picture((28, 28), "RGB")
    plain = processor(image, return_tensors="pt", do_normalize=False, do_rescale=False)["pixel_values"][0]
    assert torch.equal(plain, torch.tensor(np.asarray(image)).permute(2, 0, 1).float())
    assert processor(picture((60, 40), "RGB"), do_center_crop=False, return_tensors="pt")["pixel_values"].shape == (1, 3, 42, 28)
    with pytest.raises(ValueError, match="unknown image setting 'do_pad'; allowed are size, crop_size"):
        processor(image, do_pad=True)
    with pytest.raises(TypeError, match="class 'dict'"):
        processor({"image": 3})


@pytest.mark.usefixtures("code_cache")
def test_a_saved_processor_takes_its_code_along(tmp_path: Path) -> None:
    first = processor_of(export(make_model(), tmp_path / "out", data=dataclasses.replace(DATA, crop_pct=0.9)))
    first.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "image_processing_vmoe.py").is_file()
    image = picture((40, 51), "RGB")
    again = processor_of(tmp_path / "again")
    assert again.size == {"shortest_edge": 31}
    assert torch.equal(*(p(image, return_tensors="pt")["pixel_values"] for p in (first, again)))


@pytest.mark.usefixtures("code_cache")
def test_pipeline_sees_the_evaluation_pixels(tmp_path: Path, auto: Any) -> None:
    from transformers import pipeline

    model = make_model()
    folder = export(model, tmp_path / "out")
    image = picture((40, 51), "RGB")
    classify = pipeline("image-classification", model=str(folder), trust_remote_code=True, device="cpu")
    answer = classify(image, top_k=5)
    with torch.no_grad():
        shares = model(eval_transform(DATA)(image)[None]).output[0].softmax(dim=0)
    assert {a["label"]: a["score"] for a in answer} == pytest.approx(dict(zip(NAMES, shares.tolist(), strict=True)), rel=1e-5)


def test_preprocessing_survives_the_round_trip_for_many_sizes() -> None:
    for size in range(16, 520, 7):
        for crop_pct in (0.7, 0.8, 0.875, 0.9, 0.95, 0.99, 1.0):
            data = dataclasses.replace(DATA, image_size=size, crop_pct=crop_pct)
            back = data_from_processor(processor_config(data), 5)
            assert math.floor(size / back.crop_pct) == math.floor(size / crop_pct), (size, crop_pct)
            assert dataclasses.replace(back, crop_pct=crop_pct) == data

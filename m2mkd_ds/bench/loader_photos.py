"""Shards of photo-like JPEGs for `m2mkd bench loader`: 500x375, quality 92, 69 to 98 KB, as ImageNet's are; made from two photos.

scikit-learn brings the photos (china.jpg, flower.jpg). Each image is a random crop of one of them, perhaps flipped, with fine grain:
without it a resized picture compresses, and decodes, better than a camera's. The same seed gives the same bytes with the same Pillow.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shards.write import write_shards

WIDTH, HEIGHT, QUALITY = 500, 375, 92
"""ImageNet's most frequent size."""
GRAIN = 5.0
"""Standard deviation of the grain, in steps of 0 to 255."""
LEAST_CROP = 0.6
"""Smallest side of a crop, as a part of the photo's height."""
NUM_CLASSES = 10
NUM_SHARDS = 8


def photo_jpegs(count: int, seed: int) -> list[bytes]:
    """`count` encoded images."""
    photos = [Image.fromarray(pixels_HWC) for pixels_HWC in load_sample_images().images]
    random = np.random.default_rng(seed)
    return [_jpeg(photos[number % len(photos)], random) for number in range(count)]


def _jpeg(photo: Image.Image, random: np.random.Generator) -> bytes:
    height = photo.height * random.uniform(LEAST_CROP, 1.0)
    width = min(float(photo.width), height * WIDTH / HEIGHT)
    left, top = random.uniform(0, photo.width - width), random.uniform(0, photo.height - height)
    crop = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grainy_HWC = np.asarray(crop, dtype=np.float32) + random.normal(0, GRAIN, (HEIGHT, WIDTH, 1))
    box = io.BytesIO()
    Image.fromarray(grainy_HWC.round().clip(0, 255).astype(np.uint8)).save(box, "JPEG", quality=QUALITY)
    return box.getvalue()


def photo_shards(folder: Path, count: int, seed: int) -> ShardIndex:
    """`count` images in NUM_SHARDS equal shards with an index; `count` must be a multiple of NUM_SHARDS."""
    samples = [(jpeg, "jpg", number % NUM_CLASSES, f"photo{number:06d}") for number, jpeg in enumerate(photo_jpegs(count, seed))]
    return write_shards(
        samples,
        folder,
        total=count,
        class_names=[f"class{number}" for number in range(NUM_CLASSES)],
        source="bench loader",
        license="scikit-learn sample images (china.jpg, flower.jpg; CC BY 2.0)",
        samples_per_shard=count // NUM_SHARDS,
        seed=seed,
    )

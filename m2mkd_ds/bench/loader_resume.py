"""How long resuming takes with as many images as ImageNet has, without the images: an index whose shards are sparse files.

Only the images of one batch in the middle of epoch RESUME_EPOCH have bytes: the order is known beforehand, so they are written where
it will look for them. Everything else is real: the index is loaded and checked, the epoch ordered, a batch read and decoded.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from m2mkd_ds.data.index import ShardIndex, ShardRecord, table_dtype, write_index
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.order import StreamOrder
from m2mkd_ds.data_config import DataConfig

RESUME_EPOCH = 150
SPACING_BYTES = 110_000
"""Bytes of a shard between the beginnings of two images, as in ImageNet."""


def resume_step(num_images: int, batch: int) -> int:
    """A step in the middle of epoch RESUME_EPOCH."""
    return (RESUME_EPOCH * num_images + num_images // 2) // batch


def synthetic_index(folder: Path, jpegs: Sequence[bytes], *, num_images: int, num_shards: int, seed: int) -> None:
    """Write the folder; `jpegs` are the images of the batch that is read. Raises ValueError when there are fewer images than shards."""
    if num_images < num_shards or num_images < len(jpegs):
        raise ValueError(f"--resume-images is {num_images}; give at least --resume-shards ({num_shards}) and --batch ({len(jpegs)})")
    folder.mkdir(parents=True)
    sizes_S = np.full(num_shards, num_images // num_shards)
    sizes_S[: num_images % num_shards] += 1
    firsts_S = np.cumsum(sizes_S) - sizes_S
    table = np.zeros(num_images, dtype=table_dtype(len("n00000000_00000000")))
    table["shard"] = np.repeat(np.arange(num_shards), sizes_S)
    table["offset"] = (np.arange(num_images) - firsts_S[table["shard"]]) * SPACING_BYTES + 512
    table["size"] = SPACING_BYTES - 1024
    table["label"] = np.arange(num_images) % 1000
    table["key"] = np.char.add(b"n00000000_", np.arange(num_images).astype("S8"))
    table["extension"] = b"jpg"
    names = [f"shard-{number:06d}.tar" for number in range(num_shards)]
    for name, size in zip(names, sizes_S.tolist(), strict=True):
        with (folder / name).open("wb") as file:
            file.truncate(size * SPACING_BYTES)
    order = StreamOrder(seed, sizes_S.tolist())
    position = resume_step(num_images, len(jpegs)) * len(jpegs)
    for place, jpeg in enumerate(jpegs):
        row = table[order.slot(position + place).sample : order.slot(position + place).sample + 1]
        row["size"], row["crc32"] = len(jpeg), zlib.crc32(jpeg)
        with (folder / names[int(row["shard"][0])]).open("r+b") as file:
            file.seek(int(row["offset"][0]))
            file.write(jpeg)
    # Nobody re-hashes these shards: the index needs a sum for each, and only its form is used.
    records = [ShardRecord(name, size * SPACING_BYTES, "0" * 64, size) for name, size in zip(names, sizes_S.tolist(), strict=True)]
    classes = [f"class{number}" for number in range(1000)]
    write_index(folder, records, table, class_names=classes, source="bench loader", license="none", request={})


def resume_seconds(folder: Path, data: DataConfig, *, batch: int, workers: int, seed: int) -> float:
    """From opening the index to the first batch in the middle of an epoch."""
    started = time.perf_counter()
    index = ShardIndex.load(folder)
    step = resume_step(index.num_samples, batch)
    loader = TrainLoader(
        index,
        replace(data, train=str(folder), num_classes=index.num_classes, num_workers=workers),
        seed=seed,
        micro_batch_size=batch,
        accumulation=1,
        rank=0,
        world=1,
        start_step=step,
        total_steps=step + 1,
    )
    (first,) = loader
    assert len(first.images_BCHW) == batch
    return time.perf_counter() - started

"""What `m2mkd bench loader` measures: our loader on both decode paths, the two limits, and the peers; each opened by name.

A batch is finished when a model could take it: [B, 3, size, size], normalised float32. For `fast` the training device is torch's
`meta`, on which every operation has a result and no work: what is left is what the host does beside a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import simplejpeg
import torch

from m2mkd_ds.bench import loader_peers
from m2mkd_ds.bench.loader_measure import Opened
from m2mkd_ds.bench.loader_options import LoaderBench, Reader
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.data.order import StreamOrder
from m2mkd_ds.data_config import AugmentConfig, DataConfig

RANDAUGMENT = "rand-m9-mstd0.5-inc1"
ONE_PROCESS: tuple[Reader, ...] = ("decode_limit", "raw_read")
"""Readers without workers."""
OURS: tuple[Reader, ...] = ("pil", "fast", "fast_device")
NOTES: dict[str, str] = {
    "decode_limit": "simplejpeg, the whole image to RGB, from memory into memory that is there; nothing else",
    "raw_read": "bytes by our index in shuffled order, checked against their crc32; not decoded",
    "pil": "our loader, data.decode=pil: normalised float32 from the workers",
    "fast": "our loader, data.decode=fast, before a GPU: uint8 from the workers; flip and normalisation (the GPU's) are not counted",
    "fast_device": "the same, with flip and normalisation to float32 on this CPU, in the main process",
    **loader_peers.NOTES,
}


@dataclass(frozen=True)
class Source:
    """Shards, and what is to be made of them."""

    index: ShardIndex
    batch: int
    images: int
    """Whole batches of the shards: images a pass of ours and of the limits."""
    seed: int


def data_config(options: LoaderBench, index: ShardIndex, recipe: str, reader: Reader) -> DataConfig:
    """The recipe `crop` (random resized crop, flip), or `randaugment`, for a reader; without workers."""
    return DataConfig(
        train=str(index.folder),
        num_classes=index.num_classes,
        image_size=options.image_size,
        num_workers=0,
        decode="fast" if reader in ("fast", "fast_device") else "pil",
        augment=AugmentConfig(auto_augment=RANDAUGMENT if recipe == "randaugment" else ""),
    )


def opener(reader: Reader, source: Source, data: DataConfig, workers: int) -> Callable[[], Opened]:
    """What opens the reader: cold, from the folder."""
    if reader == "decode_limit":
        return partial(_decode_limit, source, [source.index.read(sample)[0] for sample in range(source.images)])
    if reader == "raw_read":
        return partial(_raw_read, source)
    if reader in OURS:
        return partial(_ours, reader, source, replace(data, num_workers=workers))
    return partial(loader_peers.READERS[reader], source.index, data, source.batch, workers, source.seed)


def _decode_limit(source: Source, jpegs: list[bytes]) -> Opened:
    batches = [jpegs[first : first + source.batch] for first in range(0, len(jpegs), source.batch)]
    sizes = [simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs]
    # Decoded into one place, so that memory from the system is in no image's time: the limit is to be a hard one.
    place = np.empty(max(height * width for height, width in sizes) * 3, dtype=np.uint8)

    def decode(batch: list[bytes]) -> int:
        for jpeg in batch:
            simplejpeg.decode_jpeg(jpeg, buffer=place)
        return len(batch)

    return Opened(batches, decode)


class _RawBatches:
    """Batches of encoded images in the order of epoch 0."""

    def __init__(self, source: Source) -> None:
        self._source, self._index = source, ShardIndex.load(source.index.folder)
        self._order = StreamOrder(source.seed, self._index.shard_sizes)

    def __iter__(self) -> Iterator[list[bytes]]:
        for first in range(0, self._source.images, self._source.batch):
            yield [self._index.read(self._order.slot(first + place).sample)[0] for place in range(self._source.batch)]


def _raw_read(source: Source) -> Opened:
    return Opened(_RawBatches(source), len)


def _ours(reader: Reader, source: Source, data: DataConfig) -> Opened:
    """Our training loader from step 0, one epoch's whole batches."""
    loader = TrainLoader(
        ShardIndex.load(source.index.folder),
        data,
        seed=source.seed,
        micro_batch_size=source.batch,
        accumulation=1,
        rank=0,
        world=1,
        start_step=0,
        total_steps=source.images // source.batch,
        device=torch.device("meta" if reader == "fast" else "cpu"),
    )
    return Opened(loader, partial(_count_floats, data.image_size))


def _count_floats(size: int, batch: ImageBatch) -> int:
    assert batch.images_BCHW.dtype == torch.float32 and batch.images_BCHW.shape[1:] == (3, size, size)
    return len(batch.images_BCHW)

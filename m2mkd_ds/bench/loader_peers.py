"""Other projects' input pipelines over the same shards: plain webdataset, and timm's reader and loader.

Both get the shards, the batch, random resized crop, flip, filter and normalisation that ours gets. timm's `create_loader` has a colour
jitter of its own by default; it is switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from m2mkd_ds.bench.loader_measure import Opened
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data_config import DataConfig

SHUFFLE_BUFFER = 1000
"""webdataset's own examples have this size."""
NOTES = {
    "webdataset": "WebDataset(shards).shuffle(1000).decode('pil'), timm's training transform, .batched(), DataLoader(persistent_workers); "
    "float32 from the workers",
    "timm": "create_dataset('wds/') and create_loader(use_prefetcher=False); float32 from the workers",
    "timm_prefetcher": "the same with use_prefetcher=True, device='cpu': uint8 from the workers, normalised in the main process",
}


def webdataset_reader(index: ShardIndex, data: DataConfig, batch: int, workers: int, seed: int) -> Opened:
    """The pipeline of webdataset's documentation with timm's transform."""
    import webdataset as wds
    from timm.data import create_transform

    transform = create_transform(data.image_size, is_training=True, **_recipe(data))
    urls = [str(index.folder / shard.name) for shard in index.shards]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=seed)
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(transform, _label)
        .batched(batch)
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return Opened(loader, partial(_count, data.image_size))


def timm_reader(index: ShardIndex, data: DataConfig, batch: int, workers: int, seed: int, *, use_prefetcher: bool) -> Opened:
    """timm's `wds/` reader with its loader, as its training script uses them without and with a prefetcher."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset(
        "wds/",
        root=str(index.folder),
        split=f"{_braces([shard.name for shard in index.shards])}|{index.num_samples}",
        is_training=True,
        batch_size=batch,
        seed=seed,
        input_key="jpg;jpeg;png",
    )
    loader = create_loader(
        dataset,
        input_size=(3, data.image_size, data.image_size),
        batch_size=batch,
        is_training=True,
        num_workers=workers,
        use_prefetcher=use_prefetcher,
        device=torch.device("cpu"),
        **_recipe(data),
    )
    return Opened(loader, partial(_count, data.image_size))


READERS: dict[str, Callable[[ShardIndex, DataConfig, int, int, int], Opened]] = {
    "webdataset": webdataset_reader,
    "timm": partial(timm_reader, use_prefetcher=False),
    "timm_prefetcher": partial(timm_reader, use_prefetcher=True),
}


def _recipe(data: DataConfig) -> dict[str, Any]:
    """Arguments that timm's `create_transform` and `create_loader` share."""
    return {
        "scale": data.augment.crop_scale,
        "hflip": data.augment.hflip,
        "color_jitter": data.augment.color_jitter or None,
        "auto_augment": data.augment.auto_augment or None,
        "interpolation": data.interpolation,
        "mean": data.mean,
        "std": data.std,
    }


def _braces(names: list[str]) -> str:
    """Shard names as webdataset's brace expansion of a list."""
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _label(label: int) -> int:
    return label


def _count(size: int, batch: Any) -> int:
    images_BCHW = batch[0]
    assert images_BCHW.dtype == torch.float32 and images_BCHW.shape[1:] == (3, size, size)
    return len(images_BCHW)

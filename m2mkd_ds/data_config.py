"""DataConfig: where images are, in which order they come, what happens to them. A branch of the tree in config.py, which re-exports it.

What the fields do is in docs/data.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

DATA_LIMITS: dict[str, tuple[float, float]] = {
    "num_classes": (1, inf), "image_size": (1, inf), "num_workers": (0, inf), "crop_pct": (0.01, 1), "order_window": (1, inf),
    "cache_gb": (0, inf), "look_ahead": (0, inf), "io_deadline_s": (0, inf), "max_bad_samples": (-1, inf),
    "augment.hflip": (0, 1), "augment.random_erase": (0, 1), "augment.mix_prob": (0, 1), "augment.mix_switch_prob": (0, 1),
    "augment.label_smoothing": (0, 1), "augment.mixup": (0, inf), "augment.cutmix": (0, inf), "augment.mix_group": (0, inf),
    "augment.repeats": (1, inf),
}  # fmt: skip
"""Smallest and largest allowed value by field, below `data.`."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training-time augmentation; every name means what it means in timm's `create_transform` and `Mixup`."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop. (1, 1) switches the crop off and pads/shifts instead (small images)."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of colour jitter; ignored by timm when `auto_augment` is set."""
    auto_augment: str = ""
    """timm policy string, for example `rand-m9-mstd0.5-inc1`; empty for none."""
    random_erase: float = 0.0
    """Probability of random erasing (timm mode `pixel`)."""
    mixup: float = 0.0
    """Mixup alpha; 0 switches mixup off."""
    cutmix: float = 0.0
    """Cutmix alpha; 0 switches cutmix off."""
    mix_prob: float = 1.0
    """Probability that a mixing group (`mix_group` images) is mixed at all."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix when both are on."""
    mix_group: int = 2
    """Images that share one mixing coefficient and are mixed with one another; must divide the micro-batch. As long as it is a fixed
    number, pixels do not depend on the micro-batch size. 0: the whole micro-batch, timm's `batch` mode."""
    label_smoothing: float = 0.0
    """Label smoothing, folded into the soft targets."""
    repeats: int = 1
    """Repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335): uses of an image in one pass of the stream, each augmented anew.
    The length of a phase does not change: with 3, a third of the images is seen in the time of an epoch."""
    repeat_mode: Literal["stream", "deit"] = "stream"
    """With repeats > 1. stream: the uses of an image follow one another in the stream of slots; goes on at any number of ranks.
    deit: the very indices of timm's RepeatAugSampler, which spreads them over the ranks and depends on their number."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def repeats_as_deit(self) -> bool:
        """Whether the order is that of timm's sampler, which belongs to one number of ranks."""
        return self.repeats > 1 and self.repeat_mode == "deit"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how an image becomes a tensor."""

    train: str = ""
    """Folder or URL of the training shards (holds `index.json`, see `m2mkd shards`)."""
    validation: str = ""
    """Folder or URL of the validation shards; evaluation uses every image of it exactly once."""
    source: str = ""
    """Named source that the pipeline makes the shards from when they are not there: digits | fashion_mnist | cifar100 | icons."""
    num_classes: int = 1000
    """Number of classes; checked against the index of the shards before anything runs."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean that is subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation that pixels are divided by."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter of training and evaluation."""
    crop_pct: float = 0.875
    """Evaluation: the shorter side is resized to image_size / crop_pct, then the centre is cropped."""
    num_workers: int = 2
    """Loader worker processes a rank; 0 decodes in the training process. The pixels do not depend on it."""
    decode: Literal["pil", "fast"] = "pil"
    """pil: Pillow, timm's pixels bit for bit. fast: libjpeg-turbo at a reduced size where the crop allows, uint8 from the workers,
    flip, erasing, normalisation and mixing on the training device; docs/data.md states how far the pixels differ."""
    order: Literal["global", "block"] = "global"
    """global: an epoch is one permutation of all images. block: shards are permuted, then the images inside windows of
    `order_window` shards, so that a cache has to hold a few shards only."""
    order_window: int = 16
    """Shards a window of order=block."""
    cache_dir: str = ""
    """Folder on a local disk for whole shards, shared by the ranks of a host; empty: remote samples are read one by one. Shards that
    `train` and `validation` name by a path are copied into it, too: a folder on a slow or shared disk is read once."""
    cache_gb: float = 200.0
    """Most that the cache may hold, in 10^9 bytes; the shard unused for longest goes first. Above 0 with a `cache_dir`."""
    look_ahead: int = 16
    """Shards that are fetched into the cache beyond the window of `order_window` that is in use; 0: none is fetched ahead. With
    order=block give at least order_window, and a cache that holds both. order=global needs nearly all shards at any time: a cache that
    is smaller than the data then fetches most samples' shards again and again, so use order=block or a larger cache."""
    io_deadline_s: float = 300.0
    """How long one remote read is tried again, in seconds, before it counts as a bad sample; above 0. For a whole shard that is fetched
    into the cache, the time begins anew with every MiB that has arrived."""
    allow_pipe: bool = False
    """Allow shard addresses `pipe:COMMAND`, which run COMMAND in a shell."""
    max_bad_samples: int = -1
    """Different training samples that may be damaged (each is counted, listed and replaced by the next of the order) before the run
    stops. -1: a thousandth of the images, at least 1 and at most 100. In evaluation one damaged image stops the run."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What happens to training images only."""


def check_data_config(data: DataConfig) -> None:
    """Refuse fields that do not fit together, and those whose limits depend on one another. Raises ValueError with one sentence."""
    if data.io_deadline_s <= 0:
        raise ValueError(f"data.io_deadline_s is {data.io_deadline_s:g}: no read could succeed, give more than 0 seconds")
    if data.cache_dir and data.cache_gb <= 0:
        raise ValueError(
            f"data.cache_gb is {data.cache_gb:g} with data.cache_dir {data.cache_dir}: no shard fits in, give more than 0, or leave "
            "data.cache_dir empty"
        )
    augment = data.augment
    low, high = augment.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.augment.crop_scale is {[low, high]}: give [smallest, largest] share of the area, above 0 and at most 1")
    if not all(0 < number < inf for number in data.std):
        raise ValueError(f"data.std is {list(data.std)}: pixels are divided by it, give three numbers above 0")
    if augment.mix_group % 2:
        raise ValueError(f"data.augment.mix_group is {augment.mix_group}: images are mixed in pairs, make it even (0: the micro-batch)")
    if augment.mixes and augment.repeat_mode == "stream" and augment.mix_group % (2 * augment.repeats) and augment.repeats > 1:
        raise ValueError(
            f"data.augment.mix_group is {augment.mix_group} and data.augment.repeats is {augment.repeats}: an image would be mixed with "
            f"itself; give a multiple of {2 * augment.repeats}, or 0 for the whole micro-batch and a micro_batch_size that is one"
        )


def check_mixing(augment: AugmentConfig, micro_batch_size: int, world: int | None) -> None:
    """Refuse a layout in which an image would be mixed with another use of itself. Raises ValueError with one sentence.

    `world`: ranks; None where their number is not known yet.
    """
    if not augment.mixes or augment.repeats == 1:
        return
    if augment.repeat_mode == "deit":
        if world is not None and world < augment.repeats:
            raise ValueError(
                f"data.augment.repeat_mode=deit spreads {augment.repeats} uses of an image over the ranks, and there are {world}: uses "
                f"would meet in a micro-batch, where images are mixed; launch at least {augment.repeats} ranks, or use repeat_mode=stream"
            )
    elif augment.mix_group == 0 and micro_batch_size % (2 * augment.repeats):
        raise ValueError(
            f"micro_batch_size is {micro_batch_size}, data.augment.mix_group is 0 and data.augment.repeats is {augment.repeats}: an image "
            f"would be mixed with itself; make micro_batch_size a multiple of {2 * augment.repeats}"
        )

"""The `fast` path behind the workers: uint8 pixels -> normalised, flipped, erased and mixed batch, on whatever device they lie.

Every number that decides something was drawn in the worker, so the result depends on nothing but the batch. Between devices
it differs by float rounding only. Shape letters: B images, E erased images, P erased pixels, C channels, H W pixels, V classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m2mkd_ds.data.batch import ImageBatch, WorkerBatch, on_tensors
from m2mkd_ds.data.mix import mix, soft_targets
from m2mkd_ds.data_config import DataConfig

_MASK = 0xFFFFFFFF


class Finisher:
    """From a worker's batch to the batch that a model sees, on `device`."""

    def __init__(self, data: DataConfig, device: torch.device, *, smoothing: float) -> None:
        self._device, self._num_classes, self._smoothing = device, data.num_classes, smoothing
        self._mean_C, self._std_C = (torch.tensor(numbers, device=device) for numbers in (data.mean, data.std))

    def __call__(self, batch: WorkerBatch, wait_s: float) -> ImageBatch:
        # Copies from pinned memory are queued, not waited for.
        moved = on_tensors(batch.fetched(), lambda tensor: tensor.to(self._device, non_blocking=True))
        images_BCHW, targets_BV = moved.images, moved.targets_BV
        if targets_BV is None:
            images_BCHW, targets_BV = self._finish(moved)
        batch.give_back()
        return ImageBatch(
            images_BCHW, targets_BV, batch.labels_B, batch.slot_ids_B, batch.step, batch.micro_step, batch.bad, batch.fallbacks, wait_s,
            batch.lost,
        )  # fmt: skip

    def _finish(self, batch: WorkerBatch) -> tuple[Tensor, Tensor]:
        """Normalise, flip, erase, mix: in timm's order."""
        images_BCHW = normalise(batch.images, self._mean_C, self._std_C)
        targets_BV = soft_targets(batch.labels_B, self._num_classes, self._smoothing)
        work = batch.work
        if work is None:
            return images_BCHW, targets_BV
        if work.flip_B is not None:
            images_BCHW = flip(images_BCHW, work.flip_B)
        if work.erase_E6 is not None:
            erase_(images_BCHW, work.erase_E6, work.erase_pixels)
        if work.shares_G4 is not None and work.boxes_G4 is not None:
            images_BCHW, targets_BV = mix(images_BCHW, targets_BV, work.shares_G4, work.boxes_G4)
        return images_BCHW, targets_BV


def normalise(pixels_BHWC: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """float32 [B, 3, H, W] of uint8 [B, H, W, 3]."""
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images_BCHW.div_(255).sub_(mean_C[:, None, None]).div_(std_C[:, None, None])


def flip(images_BCHW: Tensor, flip_B: Tensor) -> Tensor:
    """The images whose flag is set, mirrored left to right."""
    return torch.where(flip_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)


def erase_(images_BCHW: Tensor, boxes_E6: Tensor, num_pixels: int) -> Tensor:
    """Standard normal noise in boxes (timm's mode `pixel`), in place.

    `boxes_E6`: image, top, left, height, width, key (int64); `num_pixels`: sum of height * width, known on the host so that
    nothing waits for the device. A pixel's noise is a function of (key, row, column, channel) alone.
    """
    image_E, top_E, left_E, height_E, width_E, key_E = boxes_E6.unbind(1)
    areas_E = height_E * width_E
    box_P = torch.repeat_interleave(areas_E, output_size=num_pixels)
    within_P = torch.arange(num_pixels, device=boxes_E6.device) - (areas_E.cumsum(0) - areas_E)[box_P]
    row_P = top_E[box_P] + within_P // width_E[box_P]
    column_P = left_E[box_P] + within_P % width_E[box_P]
    channel_C = torch.arange(images_BCHW.shape[1], device=boxes_E6.device)
    counter_PC = (row_P * images_BCHW.shape[3] + column_P)[:, None] * 4 + channel_C
    noise_PC = keyed_normal(key_E[box_P][:, None], counter_PC).to(images_BCHW.dtype)
    images_BCHW.permute(0, 2, 3, 1).index_put_((image_E[box_P], row_P, column_P), noise_PC)
    return images_BCHW


def keyed_normal(keys: Tensor, counters: Tensor) -> Tensor:
    """float32 standard normal numbers, each a function of its key (int64, 62 bits used) and its counter (int64, below 2^32) alone.

    Two rounds of a 32-bit integer hash over counter and both halves of the key give two uniform numbers of 24 bits; Box and
    Muller's formula gives the normal one. The integers are the same on every device; log and cos may differ in the last bit.
    """
    first = _hash32(_hash32(counters ^ (keys & _MASK)) ^ (keys >> 32))
    second = _hash32(first ^ 0x9E3779B9)
    # Halves of a step away from 0 and 1: the logarithm is finite.
    uniform, angle = ((bits >> 8).to(torch.float32).add_(0.5).mul_(2.0**-24) for bits in (first, second))
    return uniform.log_().mul_(-2.0).sqrt_().mul_(angle.mul_(2 * math.pi).cos_())


def _hash32(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (kept in int64) in which every bit depends on all: Wellons' lowbias32."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)

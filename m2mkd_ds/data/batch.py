"""What a loader yields (`ImageBatch`), and what its workers hand to the training process for it (`WorkerBatch`).

Shape letters: B images of a micro-batch, C channels, H W pixels, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.ring import Place, ring_of
from m2mkd_ds.data.shard_files import IoCounts


@dataclass(frozen=True)
class ImageBatch:
    """One micro-batch of one rank."""

    images_BCHW: Tensor
    """float32, normalised, on the loader's device."""
    targets_BV: Tensor
    """float32 soft targets, rows sum to 1; on the loader's device."""
    labels_B: Tensor
    """int64 labels before mixing, on the CPU."""
    slot_ids_B: Tensor
    """int64: positions of the endless training stream; in evaluation, sample numbers. On the CPU."""
    step: int
    """Optimizer step; in evaluation, the number of the batch."""
    micro_step: int
    """0 .. accumulation - 1; 0 in evaluation."""
    bad: tuple[BadSample, ...] = ()
    """Damaged samples that were replaced in this batch; never in evaluation, where they raise."""
    fallbacks: int = 0
    """decode=fast: images that libjpeg-turbo could not take (PNG, CMYK, a strict decoder's refusal) and Pillow decoded."""
    wait_s: float = 0.0
    """Seconds that the training process waited for this batch."""
    lost: SampleError | None = None
    """Why there are no images: neither a sample nor any of its substitutes could be read (`TrainLoader(raise_lost=False)` alone)."""


@dataclass(frozen=True, kw_only=True)
class DeviceWork:
    """What the `fast` path leaves to the device, as drawn in the worker; None: nothing of that kind."""

    flip_B: Tensor | None = None
    """bool."""
    erase_E6: Tensor | None = None
    """int64: image, top, left, height, width, key of every erased box."""
    erase_pixels: int = 0
    """Pixels of all boxes together."""
    shares_G4: Tensor | None = None
    """float32: see data/mix.py."""
    boxes_G4: Tensor | None = None
    """int64: cutmix boxes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (DeviceWork, _packed(self))


@dataclass(frozen=True, kw_only=True)
class WorkerBatch:
    """A micro-batch as a worker hands it over."""

    images: Tensor
    """pil: float32 [B, C, H, W], done. fast: uint8 [B, H, W, C]."""
    labels_B: Tensor
    slot_ids_B: Tensor
    step: int
    micro_step: int
    targets_BV: Tensor | None
    """pil: done. fast: made on the device from the labels."""
    work: DeviceWork | None = None
    bad: tuple[BadSample, ...] = ()
    fallbacks: int = 0
    lost: SampleError | None = None
    """Then images and labels are zeros."""
    io: IoCounts = IoCounts()
    """What the process that made it did to get bytes from elsewhere, since its batch before."""
    place: Place | None = None
    """Where the images are lent memory of a ring; `images` is empty until `fetched`."""

    def left_at(self, place: Place | None) -> WorkerBatch:
        """To be sent without its images, which lie at a place of the ring; itself where they do not."""
        return self if place is None else replace(self, images=self.images.new_empty(0), place=place)

    def fetched(self) -> WorkerBatch:
        """With its images, wherever they lie; in the training process. Good until `give_back`."""
        return self if self.place is None else replace(self, images=ring_of(self.place).images(self.place, len(self.labels_B)))

    def give_back(self) -> None:
        """The images have been copied: another batch may overwrite them."""
        if self.place is not None:
            ring_of(self.place).give_back(self.place)

    def pin_memory(self) -> WorkerBatch:
        """With all tensors in page-locked memory; DataLoader's pinning thread calls this."""
        pinned = on_tensors(self.fetched(), lambda tensor: tensor.pin_memory())
        self.give_back()
        return replace(pinned, place=None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (WorkerBatch, _packed(self))


_Batch = TypeVar("_Batch", WorkerBatch, DeviceWork)


def on_tensors(batch: _Batch, change: Callable[[Tensor], Tensor]) -> _Batch:
    """A copy with every tensor changed."""
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, DeviceWork):
            changed[field.name] = on_tensors(value, change)
    return replace(batch, **changed)


def _packed(batch: WorkerBatch | DeviceWork) -> dict[str, Any]:
    """Fields to be sent: all tensors but full images as arrays, bytes in the message. A tensor is sent as a file of its own, with a
    connection made to fetch it, which takes longer than the images of a small batch.
    """
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    inline = {name: value.numpy() for name, value in values.items() if isinstance(value, Tensor) and not (name == "images" and len(value))}
    return {**values, **inline}


def _unpacked(kind: Callable[..., _Batch], values: dict[str, Any]) -> _Batch:
    return kind(**{name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in values.items()})

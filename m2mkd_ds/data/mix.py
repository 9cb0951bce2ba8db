"""Mixup and cutmix as numbers: what was drawn for each image, and its application to a whole batch at once on any device.

A group of m images shares one draw, and an image is mixed with its mirror in the group. Who draws is `Mixer` of
data/transforms.py (timm's distributions). Shape letters: B images, G groups, M images of a group, C channels, H W pixels, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixDraw:
    """One group's draw. No box: pixels are blended; with a box: its pixels come from the other image."""

    share: float = 1.0
    """Of an image in its own target; 1: not mixed."""
    box: tuple[int, int, int, int] | None = None
    """Top, bottom, left, right of cutmix."""


def group_draws(draws: Sequence[MixDraw]) -> tuple[Tensor, Tensor]:
    """Draws as tensors: float32 [G, 4] (own and other's share of targets, of pixels) and int64 [G, 4] boxes (empty for none)."""
    # 1 - share is rounded once, from float64, as timm does.
    shares = [(d.share, 1 - d.share, *((1.0, 0.0) if d.box else (d.share, 1 - d.share))) for d in draws]
    return torch.tensor(shares, dtype=torch.float32), torch.tensor([d.box or (0, 0, 0, 0) for d in draws])


def mix(images_BCHW: Tensor, targets_BV: Tensor, shares_G4: Tensor, boxes_G4: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images and targets: every image with its mirror in its group of B / G."""
    num_groups = len(shares_G4)
    images_GMCHW, targets_GMV = images_BCHW.unflatten(0, (num_groups, -1)), targets_BV.unflatten(0, (num_groups, -1))
    own_G, other_G, own_pixels_G, other_pixels_G = shares_G4.unbind(1)
    targets_GMV = targets_GMV * _column(own_G, 3) + targets_GMV.flip(1) * _column(other_G, 3)
    other_GMCHW = images_GMCHW.flip(1)
    mixed_GMCHW = images_GMCHW * _column(own_pixels_G, 5) + other_GMCHW * _column(other_pixels_G, 5)
    pasted = _inside(boxes_G4, *images_BCHW.shape[-2:])[:, None, None]
    return torch.where(pasted, other_GMCHW, mixed_GMCHW).flatten(0, 1), targets_GMV.flatten(0, 1)


def _column(numbers_G: Tensor, dim: int) -> Tensor:
    return numbers_G.view(-1, *[1] * (dim - 1))


def _inside(boxes_G4: Tensor, height: int, width: int) -> Tensor:
    """bool [G, H, W]: which pixels lie in the box."""
    rows_H, columns_W = torch.arange(height, device=boxes_G4.device), torch.arange(width, device=boxes_G4.device)
    top_G1, bottom_G1, left_G1, right_G1 = boxes_G4[:, :, None].unbind(1)
    in_rows_GH = (rows_H >= top_G1) & (rows_H < bottom_G1)
    in_columns_GW = (columns_W >= left_G1) & (columns_W < right_G1)
    return in_rows_GH[:, :, None] & in_columns_GW[:, None, :]


def soft_targets(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Smoothed one-hot targets, float32 [B, V]: 1 - smoothing + smoothing / V at the label, smoothing / V elsewhere.

    timm's Mixup and torch's cross entropy with label_smoothing agree on this definition.
    """
    off = smoothing / num_classes
    targets_BV = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    return targets_BV.scatter_(1, labels_B[:, None], 1.0 - smoothing + off)

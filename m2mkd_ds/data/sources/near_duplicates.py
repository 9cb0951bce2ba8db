"""Which pictures of a collection are copies of one another, or nearly: a perceptual hash in numpy.

The hash (pHash) of a picture: grey, averaged to 32x32, two-dimensional cosine transform, the 16x16 lowest frequencies without the
constant one; a bit says whether a coefficient is above the median of all 255. Line width, colour and small shifts of tone change few
bits, another drawing about half of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE = 32
FREQUENCIES = 16
BITS = FREQUENCIES * FREQUENCIES - 1
NEAR = 20
"""Bits of 255 that near-copies may differ in. Pairs of icons at this distance, looked at one by one, were the same drawing with another
line width or filling; above 30 there are different drawings of the same thing."""
_BLOCK = 1024


def perceptual_hashes(images_NHWC: np.ndarray) -> np.ndarray:
    """uint8 RGB [N, H, W, 3] -> bool [N, 255]."""
    frequency_F, place_P = np.arange(FREQUENCIES), np.arange(SIDE)
    cosines_FP = np.cos(np.pi * frequency_F[:, None] * (2 * place_P[None] + 1) / (2 * SIDE))
    hashes_NB = np.empty((len(images_NHWC), BITS), dtype=bool)
    for number, pixels_HWC in enumerate(images_NHWC):
        grey = Image.fromarray(pixels_HWC).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        # A symmetric drawing has coefficients of exactly 0. Rounding keeps their bits from being the noise of the arithmetic.
        coefficients_B = np.round(cosines_FP @ np.asarray(grey, dtype=np.float64) @ cosines_FP.T, 3).ravel()[1:]
        hashes_NB[number] = coefficients_B > np.median(coefficients_B)
    return hashes_NB


def distinct(images_NHWC: np.ndarray, groups: Sequence[str], near: int = NEAR) -> np.ndarray:
    """int64 ids, ascending, of the pictures to keep: the first of equal ones, and the first of near-copies in different groups.

    Near-copies within a group stay: a set's own variants of a drawing. A picture that goes makes no other one go.
    """
    kept_exactly = _first_of_equal(images_NHWC)
    signs_NB = 2 * perceptual_hashes(images_NHWC[kept_exactly]).astype(np.float32) - 1
    group_N = np.array([groups[number] for number in kept_exactly], dtype=object)
    is_kept = np.ones(len(kept_exactly), dtype=bool)
    for start in range(0, len(kept_exactly), _BLOCK):
        # Numbers of differing bits, exact in float32.
        differing = (BITS - signs_NB[start : start + _BLOCK] @ signs_NB.T) / 2
        later, earlier = np.nonzero(differing <= near)
        for a, b in zip((later + start).tolist(), earlier.tolist(), strict=True):
            if b < a and is_kept[b] and group_N[a] != group_N[b]:
                is_kept[a] = False
    return kept_exactly[is_kept]


def _first_of_equal(images_NHWC: np.ndarray) -> np.ndarray:
    first: dict[bytes, int] = {}
    for number, pixels_HWC in enumerate(images_NHWC):
        first.setdefault(pixels_HWC.tobytes(), number)
    return np.array(sorted(first.values()), dtype=np.int64)

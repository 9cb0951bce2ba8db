"""Means over episodes and how sure they are: Student's t, because tens of episodes are few; paired where models share them.

The interval covers which episodes were drawn. It does not cover another training run, nor other images than the shards hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def t_cdf_two_sided(t: float, degrees: int) -> float:
    """P(-t < T < t) for Student's T with whole degrees of freedom: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(theta) ** 2
    odd = degrees % 2 == 1
    term = math.cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for j in range(3 if odd else 2, degrees - 1, 2):
        term *= cos2 * (j - 1) / j
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def t_quantile(degrees: int) -> float:
    """t with P(-t < T < t) = 0.95, by bisection. Raises ValueError below one degree of freedom."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom are {degrees}; an interval needs at least two episodes")
    low, high = 1.9, 13.0  # 1.96 for infinitely many degrees, 12.7 for one
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf_two_sided(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """(mean, [low, high]): the 95 % t interval of the mean; None for a single value. Raises ValueError for none."""
    count = len(values)
    if not count:
        raise ValueError("no episodes: a mean of nothing has no value")
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(count - 1) * deviation / math.sqrt(count)
    return mean, [mean - half, mean + half]

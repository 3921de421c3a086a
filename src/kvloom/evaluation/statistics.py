"""Means of repeats, and how sure they are: percentile bootstrap (Efron 1979), seeded.

A resample draws as many values as there are, with replacement, and takes their mean; the interval holds
the middle 95 % of these means. With few values it is too narrow, as every percentile bootstrap is: n
values know no more than n values, so how many there were belongs beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """A mean and its interval.

    Attributes:
        mean: of the values. deviation: their sample standard deviation (n - 1). low, high: the
            interval of the mean. The last three are None for a single value, or where one is not finite.
        count: how many values.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def clear(self) -> bool:
        """Whether zero is outside of the interval: a difference that is not chance alone."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def summary(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Mean, deviation and bootstrap interval. The same values give the same interval.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("the mean of no values: give at least one")
    n = len(values)
    mean = math.fsum(values) / n if all(map(math.isfinite, values)) else sum(values) / n
    if n == 1 or not math.isfinite(mean):
        return Summary(mean, None, None, None, n)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    means = resampled_means(torch.tensor(values, dtype=torch.float64), resamples, seed)
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Summary(mean, deviation, low, high, n)


def difference(
    first: Sequence[float], second: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Summary:
    """`first - second`, pair by pair: what both share (the text, the seed) does not widen the interval.

    Raises ValueError if the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} values are no pairs: give as many of each"
        )
    return summary([a - b for a, b in zip(first, second, strict=True)], resamples, seed)


def resampled_means(values: Tensor, resamples: int, seed: int) -> Tensor:
    """Means of resamples of `values [n]`: `[resamples]`, fp64."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    return values[drawn].mean(1)

"""Calibrating kvquant on a model: ranges of key channels, and levels weighted by Fisher information.

    F_i = (d loss / d x_i)^2, x_i a pre-RoPE key or a value;   levels = argmin sum_i F_i (x_i - q(x_i))^2

Two passes over the same samples. The first, without gradients, finds the range of every key channel
without the share of outliers, half of it at either end. The second runs backward through the model and
sums F over histograms of the normalised numbers, from which the levels of each layer follow. The first
token of every sample is left out, as the cache stores it exactly (arXiv:2401.18079).

F_i is that of the number itself: normalised by offset and scale s, its error counts F_i s^2 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.evaluation import disjoint
from kvloom.formats import _levels, _ranges
from kvloom.formats._calibration import Calibration
from kvloom.hf.gradients import Cached, record

BINS = 1024  # of [-1, 1]
SKIP = 1  # first tokens of a sample, which are pinned
Advance = Callable[[int], None]


def calibrate(
    model: Any, samples: Tensor, bits: int, outliers: float, facts: dict[str, str],
    advance: Advance = lambda steps: None,
) -> Calibration:  # fmt: skip
    """Calibrate on `samples [N, T]` token ids.

    Args:
        bits, outliers: as the recipe will have them. facts: text to keep in the file.
        advance: told of each sample's pass, twice N in all.

    Raises ValueError if there is too little text, the model's rotation is not known, or gradients have
    vanished or overflowed in the model's dtype.
    """
    if samples.shape[1] <= SKIP + 1 or not len(samples):
        raise ValueError(
            f"{len(samples)} samples of {samples.shape[1]} tokens: at least 1 of {SKIP + 2} is needed"
        )
    tokens = len(samples) * (samples.shape[1] - SKIP)
    least = math.floor(outliers / 2 * tokens)  # of a channel, at either end
    extremes: list[_Extremes] = []
    for ids in samples:
        layers = record(model, ids)
        extremes = extremes or [_Extremes(least + 1) for _ in layers]
        for extreme, layer in zip(extremes, layers, strict=True):
            extreme.add(layer.keys[:, SKIP:])
        advance(1)
    ranges = [extreme.range() for extreme in extremes]
    sums = [(_Histogram(), _Histogram()) for _ in ranges]
    for ids in samples:
        for cached, scales, parts in zip(record(model, ids, True), ranges, sums, strict=True):
            _weigh(cached, scales, outliers, parts)
        advance(1)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for index, pair in enumerate(sums):
        _check_weights(index, pair, dtype)
    books = [[histogram.levels(bits) for histogram in part] for part in zip(*sums, strict=True)]
    (keys, keys_matched), (values, values_matched) = (
        (torch.stack([level.float() for level in book]) for book in zip(*part, strict=True))
        for part in books
    )
    offset, scale = (torch.stack(x).cpu() for x in zip(*ranges, strict=True))
    known = {"bits": str(bits), "outliers": str(outliers), **facts}
    return Calibration(
        offset,
        scale,
        keys,
        keys_matched,
        values,
        values_matched,
        disjoint.blocks(samples),
        known,
    )


def _check_weights(layer: int, parts: tuple[_Histogram, _Histogram], dtype: str) -> None:
    """Raise ValueError if a layer's weights say nothing."""
    for part, histogram in zip(("keys", "values"), parts, strict=True):
        total = float(histogram.sums[2].sum())
        if not (math.isfinite(total) and total > 0):
            raise ValueError(
                f"layer {layer}: the Fisher information of its {part} sums to {total} in {dtype}, so "
                "that it weighs nothing; calibrate in float32 or bfloat16"
            )


@dataclass
class _Extremes:
    """The `n` least and largest numbers of each channel so far, `[H, n, D]`."""

    n: int
    least: Tensor | None = None
    most: Tensor | None = None

    def add(self, keys: Tensor) -> None:
        """Take in `keys [H, T, D]`."""
        for name, sign in (("least", False), ("most", True)):
            held = getattr(self, name)
            x = keys if held is None else torch.cat([held, keys], 1)
            setattr(self, name, x.topk(min(self.n, x.shape[1]), 1, largest=sign).values)

    def range(self) -> tuple[Tensor, Tensor]:
        """fp16 offset and scale `[H, D]` between the n-th least and the n-th largest."""
        assert self.least is not None and self.most is not None
        return _ranges.affine(self.least[:, -1], self.most[:, -1])


class _Histogram:
    """Numbers in [-1, 1] by bins: how many, their sum, their weight and weighted sum."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, BINS, dtype=torch.float64)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Take in numbers `x [M]`, each with its weight."""
        x, weights = x.double().cpu(), weights.double().cpu()
        bins = ((x + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        for total, w in zip(self.sums, (torch.ones_like(x), x, weights, weights * x), strict=True):
            total += torch.bincount(bins, w, BINS)

    def levels(self, bits: int) -> tuple[Tensor, Tensor]:
        """The `2^bits` levels of least weighted error, plain and with Q-norm."""
        count, total, weight, weighted = self.sums
        used = weight > 0
        levels = _levels.kmeans((weighted / weight)[used], weight[used], 1 << bits)
        there = count > 0
        return levels, _levels.matched(levels, (total / count)[there], count[there])


def _weigh(
    cached: Cached, ranges: tuple[Tensor, Tensor], outliers: float,
    histograms: tuple[_Histogram, _Histogram],
) -> None:  # fmt: skip
    """Add one sample's numbers of a layer to its histograms, outliers left out."""
    assert cached.key_grads is not None and cached.value_grads is not None
    offset, scale = (x.float()[:, None] for x in ranges)
    x = (cached.keys - offset)[:, SKIP:] / scale
    weights = (cached.key_grads[:, SKIP:] * scale) ** 2
    inside = x.abs() <= 1
    histograms[0].add(x[inside], weights[inside])
    values = _ranges.of_values(cached.values[:, SKIP:], outliers)
    weights = (cached.value_grads[:, SKIP:] * values.scale.float()) ** 2
    histograms[1].add(values.x[~values.outlier], weights[~values.outlier])

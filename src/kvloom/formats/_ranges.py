"""Ranges without outliers: an offset and a scale that take numbers to [-1, 1].

x = offset + scale * normalised,   offset, scale: middle and half width of the range
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Field, Sets
from kvloom.formats import _sparse
from kvloom.formats._grid import LEAST
from kvloom.kernels.layout import LIMIT, TILE, Planes

_PLANE = Field((1, TILE), torch.float16, "value", Planes(), metadata=True)
PLANES = {"value_offset": _PLANE, "value_scale": _PLANE}  # of a tile's tokens


@dataclass
class Ranged:
    """Pages of keys or values `[N, 64, W]`, normalised.

    Attributes:
        x: fp32, within [-1, 1] but for outliers (and keys beyond a calibrated range).
        offset, scale: fp16, broadcast to `x`.
        outlier: bool like `x`; index: places of outliers in their vectors, see `_sparse`.
    """

    x: Tensor
    offset: Tensor
    scale: Tensor
    outlier: Tensor
    index: Tensor

    def sets(self) -> Sets:
        """Offset and scale of channels, a set for each page."""
        fields = {"key_offset": self.offset[:, 0], "key_scale": self.scale[:, 0]}
        return Sets(fields, torch.arange(len(self.x), device=self.x.device))

    def planes(self) -> dict[str, Tensor]:
        """Offset and scale of tokens, `[N, 2, 1, 32]`."""
        fields = {"value_offset": self.offset, "value_scale": self.scale}
        return {name: x.unflatten(1, (-1, TILE)).transpose(2, 3) for name, x in fields.items()}


def affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 offset and scale of the range [low, high], the scale from the rounded offset on."""
    offset = (low / 2 + high / 2).clamp(-LIMIT, LIMIT).to(torch.float16)
    reach = torch.maximum(high - offset.float(), offset.float() - low)
    return offset, reach.clamp(LEAST, LIMIT).to(torch.float16)


def of_keys(
    keys: Tensor, share: float, offset: Tensor | None = None, scale: Tensor | None = None
) -> Ranged:
    """Keys by channel, outliers by tile; calibrated offset and scale are fp16 `[N, D]`."""
    x = keys.float()
    if offset is not None and scale is not None:
        offset, scale = offset[:, None], scale[:, None]
        distance = ((x - offset.float()) / scale.float()).abs()
        index, outlier = _by_tile(distance, share)
        return _ranged(x, offset, scale, outlier, index)
    centre = x.median(1, keepdim=True).values
    distance = (x - centre).abs()
    index, outlier = _by_tile(distance / distance.mean(1, keepdim=True).clamp_min(LEAST), share)
    return _within(x, centre, 1, outlier, index)


def of_values(values: Tensor, share: float) -> Ranged:
    """Values by token, outliers too."""
    x = values.float()
    centre = x.median(2, keepdim=True).values
    index, outlier = _sparse.farthest((x - centre).abs(), share)
    return _within(x, centre, 2, outlier, index)


def _by_tile(distance: Tensor, share: float) -> tuple[Tensor, Tensor]:
    tiles = distance.unflatten(1, (-1, TILE)).flatten(2)
    index, outlier = _sparse.farthest(tiles, share)
    return index, outlier.view_as(distance)


def _within(x: Tensor, centre: Tensor, dim: int, outlier: Tensor, index: Tensor) -> Ranged:
    """Ranged by what is no outlier."""
    inner = torch.where(outlier, centre, x)
    offset, scale = affine(inner.amin(dim, keepdim=True), inner.amax(dim, keepdim=True))
    return _ranged(x, offset, scale, outlier, index)


def _ranged(x: Tensor, offset: Tensor, scale: Tensor, outlier: Tensor, index: Tensor) -> Ranged:
    return Ranged((x - offset.float()) / scale.float(), offset, scale, outlier, index)

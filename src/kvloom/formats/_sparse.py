"""Outliers beside packed codes: exact numbers and their places, equally many in every vector.

The vector is what outliers are sought in: the 32 x D keys of a tile, or the E values of a token. An
outlier takes two bytes (the model's dtype if it has 16 bits, else fp16) and one or two for its index.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvloom.core.format import Field, Part, Stored
from kvloom.kernels.layout import LIMIT, TILE

HALVES = (torch.float16, torch.bfloat16)


def count(share: float, size: int) -> int:
    """How many of `size` numbers are outliers: at least one if any, never all."""
    return min(size - 1, max(1, round(share * size))) if share else 0


def fields(part: Part, share: float, size: int, dtype: torch.dtype) -> dict[str, Field]:
    """The fields of one vector's outliers; none for a share of 0. Raises ValueError if too wide."""
    n = count(share, size)
    if not n:
        return {}
    if size > 1 << 15:
        raise ValueError(f"outliers among {size} {part}s have no place in 16 bits")
    numbers = Field((n,), dtype if dtype in HALVES else torch.float16, part)
    places = Field((n,), torch.uint8 if size <= 256 else torch.int16, part, metadata=True)
    return {f"{part}_outliers": numbers, f"{part}_index": places}


def farthest(distance: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The outliers of vectors `distance [..., M]`: ascending places `[..., n]`, bool `[..., M]`."""
    index = distance.topk(count(share, distance.shape[-1]), -1).indices.sort(-1).values
    return index, torch.zeros_like(distance, dtype=torch.bool).scatter_(-1, index, True)


def take(part: Part, x: Tensor, index: Tensor, described: Mapping[str, Field]) -> dict[str, Tensor]:
    """The fields of the numbers at `index` of vectors `x [..., M]`."""
    if f"{part}_outliers" not in described:
        return {}
    numbers, places = (described[f"{part}_{name}"].dtype for name in ("outliers", "index"))
    exact = x.gather(-1, index)
    exact = exact.clamp(-LIMIT, LIMIT) if numbers == torch.float16 else exact
    return {f"{part}_outliers": exact.to(numbers), f"{part}_index": index.to(places)}


def put(part: Part, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """Vectors `x [..., M]` with their outliers in place."""
    if f"{part}_outliers" not in stored:
        return x
    exact = stored[f"{part}_outliers"].to(x.dtype)
    return x.scatter(-1, stored[f"{part}_index"].long(), exact)


def counts(stored: Stored) -> Tensor | None:
    """See `PageFormat.outlier_counts`: a tile's keys, and the values of its tokens."""
    if "key_outliers" not in stored.tile:
        return None
    keys, values = stored.tile["key_index"], stored.slot["value_index"]
    each = keys.shape[-1] + TILE * values.shape[-1]
    return torch.full(keys.shape[:-1], each, device=keys.device)

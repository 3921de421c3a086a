"""A fixed split of the budget over layers and heads, by hand or from another tool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.policy import Allocator, check


@dataclass(frozen=True)
class Weighted(Allocator):
    """Budgets in proportion to `layers[l] * heads[h]`, repeated cyclically.

    Attributes:
        layers: relative budget of each layer, heads: of each KV head, all above 0. With measured
            weights this is the allocation of DuoAttention (arXiv:2410.10819) or PyramidKV
            (arXiv:2406.02069) as a constant.
    """

    layers: tuple[float, ...] = (1.0,)
    heads: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("layers", "heads"):
            weights = getattr(self, name)
            sound = (
                isinstance(weights, tuple)
                and weights
                and all(0 < w < float("inf") for w in weights)
            )
            check(self, bool(sound), f"{name} must be a tuple of numbers above 0")

    def shares(self, layers: int, heads: int) -> Tensor:
        by_layer = _cycle(self.layers, layers)
        by_head = _cycle(self.heads, heads)
        grid = by_layer[:, None] * by_head[None]
        return grid / grid.mean()


def _cycle(weights: tuple[float, ...], n: int) -> Tensor:
    return torch.tensor([weights[i % len(weights)] for i in range(n)], dtype=torch.float64)

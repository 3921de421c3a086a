"""PyramidKV: budgets that fall linearly with depth (Cai et al., arXiv:2406.02069, section 4.1).

    b_last = b / beta,   b_first = 2 b - b_last,   b_l = b_first - l (b_first - b_last) / (L - 1)

Attention is spread widely in the lower layers and gathers on few tokens in the upper ones, so the
lower layers get more of the same total; b is the average per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.policy import Allocator, check


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Linearly decreasing layer budgets, equal over the heads of a layer.

    Attributes:
        beta: the last layer gets 1 / beta of the average; 1 is uniform, the paper uses 20.

    Deviations: the paper's b comes on top of the observation window, here the window is part of
    the budget (with small budgets, a last layer of b / 20 entries may be all window; a smaller
    beta keeps more). The authors' code flattens the pyramid when b_first exceeds the prompt; here
    the first layers then hold all there is and their rest is not handed on.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        sound = type(self.beta) in (int, float) and 1 <= self.beta < float("inf")
        check(self, sound, "beta must be a number of at least 1")

    def shares(self, layers: int, heads: int) -> Tensor:
        last = 1 / self.beta if layers > 1 else 1.0
        by_layer = torch.linspace(2 - last, last, layers, dtype=torch.float64)
        return by_layer[:, None].expand(layers, heads)

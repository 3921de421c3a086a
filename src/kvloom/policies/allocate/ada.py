"""Ada-KV: heads of a layer compete for one budget (Feng et al., arXiv:2407.11550, algorithm 1).

    b_h = | top-B of the scores of all heads together, those that lie in head h |,   b_h >= alpha B / H

Heads whose attention is concentrated leave their budget to heads whose attention is spread, which
minimises an upper bound of the eviction loss. The floor keeps starved heads alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.policy import Allocator, check


@dataclass(frozen=True)
class Ada(Allocator):
    """Budgets by a top-k over all KV heads of a layer; evicted entries of any head free real bytes.

    Attributes:
        alpha: share of the even budget B / H that every head keeps in any case (paper: 0.2).

    Deviations: the paper blends, b_h <- alpha B / H + (1 - alpha) b_h; here, as in the authors'
    version for kvpress, every head keeps its best floor(alpha B / H) and the rest goes by score,
    which has the same minimum, rounds nothing away, and holds when heads are unequal already,
    since the split is made anew at every compression. The scorer's recent window counts as chosen.
    Scores of different heads are compared as they are, so the scorer should be an attention weight
    (`snapkv`, `tova(per_head=True)`, `h2o`, `expected_attention`); `epsilon=0.02` for the latter.
    """

    pools: ClassVar[bool] = True

    alpha: float = 0.2

    def __post_init__(self) -> None:
        sound = type(self.alpha) in (int, float) and 0 <= self.alpha <= 1
        check(self, sound, "alpha must be within 0..1")

    def split(self, scores: Tensor, valid: Tensor, total: Tensor) -> Tensor:
        B, H, S = scores.shape
        total = total.to(scores.device)
        floor = self._floor(total, H)[:, None]
        # place of each entry within its head, the newer first among equals
        order = torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)
        place = torch.empty_like(order)
        place.scatter_(-1, order, torch.arange(S, device=scores.device).expand_as(order))
        place = place.flip(-1)
        most = total[:, None] - (H - 1) * floor  # `largest` promises no more
        open_to = valid & (place < most[..., None])
        value = scores.masked_fill(place < floor[..., None], float("inf"))
        value = value.masked_fill(~open_to, float("-inf")).flatten(1)
        best = torch.argsort(value, dim=-1, descending=True, stable=True)
        chosen = torch.arange(H * S, device=scores.device) < total[:, None]
        taken = torch.zeros_like(chosen).scatter(-1, best, chosen).view(B, H, S) & open_to
        return taken.sum(-1).cpu()

    def largest(self, capacity: Tensor) -> Tensor:
        total = capacity.sum(1, keepdim=True)
        return total - (capacity.shape[1] - 1) * self._floor(total, capacity.shape[1])

    def _floor(self, total: Tensor, heads: int) -> Tensor:
        return (total.double() * (self.alpha / heads)).long()

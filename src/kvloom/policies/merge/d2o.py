"""D2O: losers that resemble a survivor are recalled and merged into it, the others are dropped.

Wan et al., ICLR 2025 (arXiv:2406.13035)

u_j = max_kept cos(k_j, k_i),   tau_1 = mean_j u_j,   tau_t = beta mean_j u_j + (1 - beta) tau_t-1
where u_j >= tau_t:   k_i <- (e k_i + sum_j exp(u_j) k_j) / (e + sum_j exp(u_j)),   v_i likewise
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvloom.core.merge import Group, Memory, Merged, SurvivorMerger
from kvloom.core.policy import check
from kvloom.policies.merge._counts import finest
from kvloom.policies.merge._nearest import mean_into, nearest_open


@dataclass(frozen=True)
class D2O(SurvivorMerger):
    """Merge what is more alike than usual into its nearest survivor, keys and values.

    Attributes:
        beta: weight of the newest mean similarity in the moving threshold, above 0 and at most 1.

    Made for h2o with sinks and a recent window. Keys are rotated already when they are averaged, as
    in the published code.

    Deviations: the threshold is per KV head, since heads may lose different numbers of entries; the
    published code has one per layer and compares it with means over heads. Weights are the paper's;
    its code weighs a loser by its cosine, a survivor by 1, and divides by their number. The paper
    also gives more of the budget to layers whose attention varies less over the prompt's tokens, and
    leaves its first two layers and the last alone: that is an allocator, and not here. Losers whose
    most similar survivor is sealed are dropped, and do not move the threshold. Of survivors whose
    cosines differ by less than 1 in 65,536 the oldest is the most similar.
    """

    name: ClassVar[str] = "d2o"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    beta: float = 0.5

    def __post_init__(self) -> None:
        sound = type(self.beta) in (int, float) and 0 < self.beta <= 1
        check(self, sound, "beta must be above 0 and at most 1")

    @property
    def conserves(self) -> bool:
        return False

    def memory(self, rows: int, heads: int) -> Memory:
        """The threshold, -inf before the first compression."""
        return {"threshold": torch.full((rows, heads), -math.inf)}

    def merge(self, group: Group) -> Merged:
        cosine, index = nearest_open(group.keys, group.lost, group.kept, group.open)
        found = torch.isfinite(cosine)
        number = found.sum(-1)
        # equal similarities must reach a mean that is rounded
        mean = cosine.to(finest(cosine.device)).masked_fill(~found, 0.0).sum(-1) / number
        old = group.memory["threshold"]
        moved = torch.where(torch.isinf(old), mean, self.beta * mean + (1 - self.beta) * old)
        threshold = torch.where(number > 0, moved.float(), old)

        folded = found & (cosine >= threshold[..., None])
        weight = torch.exp(cosine).masked_fill(~folded, 0.0)
        own = torch.full_like(weight, math.e)
        keys = mean_into(index, weight, own, group.keys)
        values = mean_into(index, weight, own, group.values)
        return Merged(values, keys, memory={"threshold": threshold}, folded=folded)

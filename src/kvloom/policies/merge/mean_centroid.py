"""One centroid per head that stands for everything evicted: the smallest merger with mass.

    K <- (n K + sum k_i) / (n + m),  V likewise,  n <- n + m,  logit = q . RoPE(K, p) / sqrt(d) + log n

The proportional attention of token merging (ToMe, arXiv:2210.09461) on pre-RoPE keys, as in
MP-KVM, with a single centroid. If its members are identical (same key, value and position), the
output equals full attention exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvloom.core.block import Block
from kvloom.core.merge import CentroidMerger, Losers
from kvloom.policies.merge._counts import counts_of


@dataclass(frozen=True)
class MeanCentroid(CentroidMerger):
    """Fold all losers into one running mean; its position is the mean position of its members.

    Deviation from running means elsewhere: the centroid is kept in fp32, since a mean over
    thousands of tokens stops moving in a 16-bit dtype.
    """

    def dtype(self, model: torch.dtype) -> torch.dtype:
        return torch.float32

    @property
    def centroids(self) -> int:
        return 1

    def fold(self, losers: Losers, centroids: Block) -> Block:
        weight = torch.exp(losers.mass).masked_fill(~losers.valid, 0.0)
        added = weight.sum(-1, keepdim=True)
        old = counts_of(centroids.meta["mass"])  # 0 while the centroid is empty
        total = old + added
        share = (weight / total.clamp_min(1e-30))[..., None]
        keep = (old / total.clamp_min(1e-30))[..., None]

        keys = centroids.keys * keep + (losers.keys * share).sum(2, keepdim=True)
        values = centroids.values * keep + (losers.values * share).sum(2, keepdim=True)
        position = centroids.meta["positions"] * keep[..., 0] + (
            losers.positions * share[..., 0]
        ).sum(2, keepdim=True)
        meta = {"mass": torch.log(total), "positions": position}
        return Block(keys, values, torch.ones_like(centroids.count), meta)

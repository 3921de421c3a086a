"""KeyDiff: keep the keys that point away from the average (Park et al., arXiv:2504.15364).

    a = 1/n sum_i k_i / |k_i|,    score_j = - cos(k_j, a)

Keys that differ from most others receive more attention; near copies of the average key do not. No
attention weights are needed, and blocks of a prompt can be compressed as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keys least similar to the mean of the normalised keys that are kept so far.

    Attributes:
        recent_fraction: share of the budget that is a recent window (the paper's variant with a
            sliding window); 0 as in the paper's main method.

    Deviations: none in the score. The prompt of one forward is scored at once, as in a block of
    the paper that is as long as the prompt; `prefill_chunk_size` makes the blocks smaller.
    """

    name: ClassVar[str] = "keydiff"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    recent_fraction: float = 0.0

    def __post_init__(self) -> None:
        sound = type(self.recent_fraction) in (int, float) and 0 <= self.recent_fraction <= 1
        check(self, sound, "recent_fraction must be within 0..1")

    def protected(self, capacity: Tensor) -> Tensor:
        return (capacity.double() * self.recent_fraction).long()

    def score(self, entries: Entries) -> Tensor:
        keys = entries.keys.float()
        norm = keys.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        weight = entries.valid / norm  # the mean over n only scales the anchor
        anchor = torch.einsum("bhs,bhsd->bhd", weight, keys)
        anchor = torch.nn.functional.normalize(anchor, dim=-1)
        similarity: Tensor = torch.einsum("bhsd,bhd->bhs", keys, anchor) / norm
        return -similarity

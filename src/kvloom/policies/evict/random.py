"""Random: keep a uniform sample of everything seen, the baseline that needs no idea at all.

    score_j = h(seed, layer, head, position_j) / 2^24,   keep the largest

h is 24 bits of chained murmur3 finalizers (A. Appleby). Keeping the k largest hashes is bottom-k
sampling (Cohen and Kaplan, PODC 2007): at any time the kept entries are a uniform sample without
replacement of all tokens so far, although most of them were evicted long ago.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check
from kvloom.policies._hash import draws


@dataclass(frozen=True)
class Random(Scorer):
    """A uniform sample, by a hash of the original position.

    Batching, padding, chunking, beams and formats cannot change what is kept, since the hash knows
    nothing but seed, layer, KV head and position.

    Attributes:
        seed: which sample.
        recent_fraction: share of the budget that is a recent window instead; 0: none, so that even
            the newest token is only kept by chance.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    seed: int = 0
    recent_fraction: float = 0.0

    def __post_init__(self) -> None:
        check(self, type(self.seed) is int, "seed must be an int")
        sound = type(self.recent_fraction) in (int, float) and 0 <= self.recent_fraction <= 1
        check(self, sound, "recent_fraction must be within 0..1")

    def protected(self, capacity: Tensor) -> Tensor:
        return (capacity.double() * self.recent_fraction).long()

    def score(self, entries: Entries) -> Tensor:
        return draws(entries.positions, self.seed, entries.layer)

"""Random: keep a uniform sample of everything seen, the baseline that needs no idea at all.

    score_j = h(seed, layer, head, position_j) / 2^24,   keep the largest

h is 24 bits of chained murmur3 finalizers (A. Appleby). Keeping the k largest hashes is bottom-k
sampling (Cohen and Kaplan, PODC 2007): at any time the kept entries are a uniform sample without
replacement of all tokens so far, although most of them were evicted long ago.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check

_WORD = (1 << 32) - 1


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
        heads = torch.arange(entries.valid.shape[1], device=entries.valid.device)
        word = _mix(torch.tensor(self.seed & _WORD, device=entries.valid.device))
        for part in (entries.layer, heads[:, None], entries.positions.long()):
            word = _mix(word ^ (part + 0x9E3779B9))
        return (word >> 8).float() / (1 << 24)


def _mix(word: Tensor) -> Tensor:
    """Murmur3's 32-bit finalizer; int64 products wrap, and only their low 32 bits count."""
    word = word & _WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)

"""Refit: the survivors' values by least squares, so that past queries read what they read before.

    y_t = sum_all softmax(q_t K)_s v_s,   X_t = softmax(q_t K_kept),   R = Y - X V
    V <- V + D,   D = argmin ||R - X D||^2 + ridge ||D||^2 = X' (X X' + ridge)^-1 R

The values of Attention Matching (arXiv:2602.16284, C_v = (X'X)^-1 X'Y), with the ridge around the
old values of GRKV (arXiv:2605.31105). Keys stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvloom.core.merge import Group, Memory, Merged, SurvivorMerger
from kvloom.core.policy import Queries, check
from kvloom.policies.evict._attention import forget_newest, remember_newest
from kvloom.policies.merge._least_squares import refitted


@dataclass(frozen=True)
class Refit(SurvivorMerger):
    """Spread what is lost over all survivors, as the newest queries of each layer saw it.

    Attributes:
        queries: how many of the newest queries are remembered per head; all heads of a group count.
            They cost their bytes, and a solve of their number at every compression: let a schedule
            such as `lazy(every=16)` space those out.
        ridge: how dear it is to move a value, in squared attention; above 0.

    The squared error on the remembered queries is never above that of dropping; on later queries it
    can be, and the more so, the lower the ridge. Measured on the testbed model after snapkv, 2 texts,
    the 256 queries after the fit: squared error over that of dropping, in all and in the worst layer,
    at 25 % kept 0.92 and 1.13 (ridge 0.01, GRKV's), 0.94 and 1.03 (0.3), 0.96 and 1.002 (1); at
    6.25 % kept 1.12 and 5.2, 0.93 and 1.24, 0.92 and 1.01. Hence the default.
    Token by token, with 128 entries and a fit at every step, none of it was gain: a divergence from the
    full cache of 0.277 for dropping, 0.302 (ridge 0.01), 0.278 (0.3) and 0.279 (1).

    Deviations: both papers compress once, after the prompt, and draw queries from all of it or make
    them up; these are the newest at every compression. Entries that are sealed stay as they are, and
    their weights count. Pinned sinks are outside both softmaxes: what is matched is the output of the
    rest, as where Attention Matching compacts a part, but without its bias for the mass that the
    rest lost. GRKV's step on the keys is left out, and so is its cap on the change of values.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "values"})

    queries: int = 64
    ridge: float = 1.0

    def __post_init__(self) -> None:
        check(
            self, type(self.queries) is int and self.queries > 0, "queries must be an int above 0"
        )
        sound = type(self.ridge) in (int, float) and 0 < self.ridge < float("inf")
        check(self, sound, "ridge must be a finite number above 0")

    @property
    def conserves(self) -> bool:
        return False

    def remember(self, memory: Memory, queries: Queries) -> Memory:
        return remember_newest(memory, queries, self.queries)

    def forget(self, memory: Memory, n: int) -> Memory:
        return forget_newest(memory, n)

    def merge(self, group: Group) -> Merged:
        changes = group.lost.any(-1, keepdim=True) & group.open
        values = torch.where(changes[..., None], refitted(group, self.ridge), group.values)
        return Merged(values, folded=group.lost & changes.any(-1, keepdim=True))

"""H2O: keep the heavy hitters of accumulated attention (Zhang et al., arXiv:2306.14048).

    score_j = sum over all queries t seen so far of softmax_t(j),  summed over the query group

A fixed part of the budget is the recent window; the rest goes to the entries that have received
the most attention since they arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check


@dataclass(frozen=True)
class H2O(Scorer):
    """Heavy hitters and a recent window.

    Attributes:
        recent: share of the budget that is the recent window (paper: half, 10 % + 10 %).
        sinks: first tokens pinned besides; 0 as in the paper.

    Deviations: with grouped queries the attention of a group is summed (the paper has one query
    head per KV head); attention of padded queries does not count; columns are accumulated in query
    blocks, so that no attention matrix is kept.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention_mass"})
    scores_attention: ClassVar[bool] = True

    recent: float = 0.5
    sinks: int = 0

    def __post_init__(self) -> None:
        check(
            self,
            type(self.recent) in (int, float) and 0 <= self.recent <= 1,
            "recent must be within 0..1",
        )
        check(self, type(self.sinks) is int and self.sinks >= 0, "sinks must be an int >= 0")

    @property
    def pinned(self) -> int:
        return self.sinks

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("received",)

    def protected(self, capacity: Tensor) -> Tensor:
        return (capacity.double() * self.recent).long().clamp_min(1)

    def arrive(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"received": torch.zeros(keys.shape[:3], device=keys.device)}

    def observe(self, state: dict[str, Tensor], observed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"received": state["received"] + observed["attention_mass"]}

    def score(self, entries: Entries) -> Tensor:
        return entries.state("received")

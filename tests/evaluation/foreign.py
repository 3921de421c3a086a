"""A policy as another package would bring it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer


@dataclass(frozen=True)
class Newest(Scorer):
    """Keeps what came last."""

    name = "foreign_newest"
    needs = frozenset({"positions"})

    def score(self, entries: Entries) -> Tensor:
        return entries.positions.float()

"""Drop: losers vanish, as in every paper on eviction; the merger to compare all others with.

kept entries stay as they are; nothing of the others lives on
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.core.merge import Merger


@dataclass(frozen=True)
class Drop(Merger):
    """No merging, said aloud: a recipe with it is the recipe without it, in every byte.

    It fills the merger's place in grids and comparisons. No layer counts as merging, so that
    evictions which only move the start of a window stay as cheap as they are.
    """

    @property
    def conserves(self) -> bool:
        return False

    def serves(self, layer: int) -> bool:
        return False

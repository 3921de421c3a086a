"""Recent: a sliding window over the newest entries, the baseline that every method has to beat.

    keep(t) = {t-W+1 .. t}

Longformer's sliding window (Beltagy et al., arXiv:2004.05150) as a cache policy. Once the first
tokens fall out of the window, perplexity explodes (arXiv:2309.17453, figure 3): see `streaming_llm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvloom.core.block import from_newest
from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check


@dataclass(frozen=True)
class Recent(Scorer):
    """A recent window and nothing else; entries keep their original positions.

    Attributes:
        window: W, newest tokens kept; None takes what the budget leaves.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        sound = self.window is None or (type(self.window) is int and self.window >= 1)
        check(self, sound, "window must be an int of at least 1, or None")

    @property
    def capacity(self) -> int | None:
        return self.window

    @property
    def oldest_first(self) -> bool:
        return True

    def score(self, entries: Entries) -> Tensor:
        """Minus the number of entries that are at least as new."""
        return -from_newest(entries.valid)

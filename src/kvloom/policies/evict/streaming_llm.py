"""StreamingLLM: keep the first tokens and the newest ones (Xiao et al., arXiv:2309.17453).

    keep(t) = {0 .. S-1}  u  {t-W+1 .. t}

The first tokens act as attention sinks; without them perplexity explodes once they fall out of a
sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvloom.core.block import from_newest
from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Sinks and a recent window.

    Attributes:
        sinks: S, the first valid tokens of each row, pinned.
        recent: W, newest tokens always kept; None takes what the budget leaves.
        positions: `"in_cache"` as in the paper: an entry's position is its place in the cache, so
            that distances never exceed S + W; `"original"`: entries keep their own positions.

    Deviation: the paper caches pre-RoPE keys and rotates them at every step. RoPE is relative, so
    here the keys stay rotated at their own positions and, for the sinks alone, the query is
    rotated by the gap instead, which is the same algebra at no cost per key.
    """

    sinks: int = 4
    recent: int | None = None
    positions: str = "in_cache"

    def __post_init__(self) -> None:
        check(self, type(self.sinks) is int and self.sinks >= 0, "sinks must be an int >= 0")
        check(
            self,
            self.recent is None or (type(self.recent) is int and self.recent >= 1),
            "recent must be an int of at least 1",
        )
        check(self, self.positions in ("in_cache", "original"), "positions: in_cache or original")

    @property
    def pinned(self) -> int:
        return self.sinks

    @property
    def capacity(self) -> int | None:
        return None if self.recent is None else self.sinks + self.recent

    @property
    def in_cache(self) -> bool:
        return self.positions == "in_cache"

    @property
    def oldest_first(self) -> bool:
        return True

    def score(self, entries: Entries) -> Tensor:
        """Minus the number of entries that are at least as new."""
        return -from_newest(entries.valid)

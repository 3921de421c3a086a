"""The baseline without a cache: a sliding window, computed anew for every token.

    p(t_{i+1}) = model(t_{i-W+1} .. t_i), at positions 0 .. W-1

It is the "sliding window with re-computation" that StreamingLLM is compared with (Xiao et al.,
arXiv:2309.17453): the quality that a window of W tokens can have, at W tokens' work for each.

Deviation: a sample of the text is scored, since all of it takes too long; compare its change against
the full cache on the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recompute:
    """The baseline without a cache: `recompute(window=1020, positions=500)`.

    Attributes:
        window: W, tokens that each forward sees. positions: how many evenly spaced positions of the
            document's decoded part are scored and timed; 0: none is scored, and the last 100
            tokens are timed.
    """

    window: int
    positions: int = 500

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("positions", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{self}: {name} must be an int of at least {least}")

    def __str__(self) -> str:
        return f"recompute(window={self.window!r}, positions={self.positions!r})"

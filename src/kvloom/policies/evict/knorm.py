"""KnormPress: keys of small norm receive much attention (Devoto et al., arXiv:2406.11430).

    score_j = - |k_j|_2,   keep ceil(r L) of L entries when L >= P

RoPE preserves norms, so it does not matter when they are taken; here when a key arrives, exactly,
before any format rounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check


@dataclass(frozen=True)
class Knorm(Scorer):
    """Smallest key norms, in three modes that say how many entries stay.

    - `"budget"` (default): as many as the cache's budget allows, at any time.
    - `"once"`: prompts only. After a forward of more than one token, ceil(r * tokens seen), if the
      layer then holds at least P entries; generated tokens all stay until the next such forward.
    - `"recurrent"`: as published in code. After *every* forward, ceil(r L) of L entries if L >= P.
      Repetition compounds: whatever r is, a long prompt shrinks step by step until L < P, and the
      length then saws between r P and P. So `prune_after` sets the footprint, and r the teeth.

    Norms are compared to 16 bits, and equal ones keep the newer: a token has the same norm wherever it
    stands in the first layer, and rounding that depends on batching should not choose between two.

    The last two modes bound nothing in advance: they take no budget and no schedule, and the cache
    has no ceiling. Entries are kept in the order of time, at their original positions.

    Attributes:
        mode: see above. keep_ratio: r, prune_after: P, entries per head; both belong to the last two
            modes, since a budget says itself how many entries stay.
        skip_layers: compressed layers (from 0) from which nothing is evicted; the code skips 0, or
            0 and 1, since norms say little there. They grow with the text.
        keep: `"low"` norms, or `"high"` ones as a control.
        recent_fraction: share of what stays that is a recent window (half of it in the authors'
            later test); 0: none, so that even the newest entry may go at once.
        sinks: first tokens pinned (published: none).
    """

    mode: str = "budget"
    keep_ratio: float = 0.9
    prune_after: int = 512
    skip_layers: tuple[int, ...] = ()
    keep: str = "low"
    recent_fraction: float = 0.0
    sinks: int = 0

    MODES: ClassVar[tuple[str, ...]] = ("budget", "once", "recurrent")

    def __post_init__(self) -> None:
        check(self, self.mode in self.MODES, f"mode is one of {', '.join(map(repr, self.MODES))}")
        sound = type(self.keep_ratio) in (int, float) and 0 < self.keep_ratio <= 1
        check(self, sound, "keep_ratio must be above 0 and at most 1")
        whole = type(self.prune_after) is int and self.prune_after >= 1
        check(self, whole, "prune_after must be an int >= 1")
        layers = isinstance(self.skip_layers, tuple) and all(
            type(i) is int and i >= 0 for i in self.skip_layers
        )
        check(self, layers, "skip_layers must be a tuple of layer numbers, such as (0, 1)")
        check(self, self.keep in ("low", "high"), "keep is 'low' or 'high'")
        sound = type(self.recent_fraction) in (int, float) and 0 <= self.recent_fraction <= 1
        check(self, sound, "recent_fraction must be within 0..1")
        check(self, type(self.sinks) is int and self.sinks >= 0, "sinks must be an int >= 0")

    @property
    def pinned(self) -> int:
        return self.sinks

    @property
    def sets_target(self) -> bool:
        return self.mode != "budget"

    @property
    def exempt_layers(self) -> tuple[int, ...]:
        return self.skip_layers

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("norm",)

    def protected(self, capacity: Tensor) -> Tensor:
        return (capacity.double() * self.recent_fraction).long()

    def target(self, length: Tensor, seen: Tensor, new: Tensor) -> Tensor:
        due = length >= self.prune_after
        if self.mode == "once":
            due = due & (new > 1)
        base = seen.expand_as(length) if self.mode == "once" else length
        goal = (base.double() * self.keep_ratio).ceil().long().clamp_min(self.sinks)
        return torch.where(due, goal, length)

    def arrive(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"norm": keys.float().norm(dim=-1)}

    def score(self, entries: Entries) -> Tensor:
        bits = entries.state("norm").view(torch.int32)
        norm = ((bits + 64) & ~127).view(torch.float32)  # 16 of 23 bits, to nearest
        return -norm if self.keep == "low" else norm

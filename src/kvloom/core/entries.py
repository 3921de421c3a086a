"""`Entries`: what a policy sees of one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass
class Entries:
    """The evictable entries of one layer, oldest first; the pinned sinks are not among them.

    Attributes:
        valid: bool `[B, H, S]`; a slot that is not valid is padding, dead, or past a ragged end.
        meta: `[B, H, S]` tensors: `positions`, `mass` (log of the tokens that an entry stands
            for), and the slot state of the scorer. Only what the recipe needs is there.
        decode_keys, decode_values: produce `[B, H, S, D]`; called at most once, on demand.
        layer: index among the compressed layers.
        tiled: how many leading slots can only be evicted by whole 32-slot tiles.
    """

    valid: Tensor
    meta: dict[str, Tensor]
    decode_keys: Callable[[], Tensor]
    decode_values: Callable[[], Tensor]
    layer: int = 0
    tiled: int = 0

    @cached_property
    def keys(self) -> Tensor:
        """`[B, H, S, D]`, as stored (post-RoPE unless the format is pre-RoPE)."""
        return self.decode_keys()

    @cached_property
    def values(self) -> Tensor:
        """`[B, H, S, E]`."""
        return self.decode_values()

    @property
    def positions(self) -> Tensor:
        """Original token index of each entry, int32 `[B, H, S]`."""
        return self.meta["positions"]

    def state(self, name: str) -> Tensor:
        """Slot state that the scorer keeps, fp32 `[B, H, S]`."""
        return self.meta[name]

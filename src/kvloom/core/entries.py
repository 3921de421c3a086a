"""`Entries`: what a policy sees of one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from kvloom.positions.rope import RopeSpec


@dataclass
class Entries:
    """The evictable entries of one layer, oldest first; the pinned sinks are not among them.

    Attributes:
        valid: bool `[B, H, S]`; a slot that is not valid is padding, dead, or past a ragged end.
        meta: `[B, H, S]` tensors: `positions`, `mass` (log of the tokens that an entry stands
            for), and the slot state of the scorer. Only what the recipe needs is there.
        decode_keys, decode_values, decode_pre_rope: produce `[B, H, S, D]`; called at most once,
            on demand.
        layer, layers: index among the compressed layers, and their number.
        tiled: how many leading slots can only be evicted by whole 32-slot tiles.
        memory: what the scorer remembers of the queries (`Scorer.remember`).
        scale, softcap: of the attention logits, as the model last used them.
        output_weight: `[H, G, E, hidden]`, the part of the output projection that reads each query
            head, if the recipe needs it.
        target: host int64 `[B, H]`, how many of them will stay; an even share if the heads pool
            their budget.
        rope: the layer's rotation, if the recipe needs anything before rotation.
        scores: `[B, H, S]`, what the scorer thought of them, once it was asked.
    """

    valid: Tensor
    meta: dict[str, Tensor]
    decode_keys: Callable[[], Tensor]
    decode_values: Callable[[], Tensor]
    decode_pre_rope: Callable[[], Tensor] | None = None
    layer: int = 0
    layers: int = 1
    tiled: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float | None = None
    output_weight: Tensor | None = None
    rope: RopeSpec | None = None
    target: Tensor | None = None
    scores: Tensor | None = None

    @cached_property
    def keys(self) -> Tensor:
        """`[B, H, S, D]`, rotated as attention uses them."""
        return self.decode_keys()

    @cached_property
    def pre_rope_keys(self) -> Tensor:
        """`[B, H, S, D]` before rotation; the recipe must need `pre_rope_keys`."""
        assert self.decode_pre_rope is not None
        return self.decode_pre_rope()

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

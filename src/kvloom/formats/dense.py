"""Dense pages: entries as the model made them, in its own dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Field, Layout, PageBatch, PageFormat, Stored
from kvloom.core.policy import check


@dataclass(frozen=True)
class Dense(PageFormat):
    """Exact storage.

    Attributes:
        rope: `"post"` stores keys as attention uses them, `"pre"` before rotation (they are
            rotated when they are read), which costs one rounding to the model's dtype.
        unpaged: where entries may leave, heads whose capacity is at most this (sinks aside) are kept
            in one piece instead of in pages: copying them at each compression costs little, no page
            is half empty, and a small budget is used to the last 16 entries. 0: always pages, as with `rope="pre"`.
    """

    rope: str = "post"
    unpaged: int = 512

    def __post_init__(self) -> None:
        check(self, type(self.unpaged) is int and self.unpaged >= 0, "unpaged must be an int >= 0")
        check(self, self.rope in ("post", "pre"), "rope is 'post' or 'pre'")

    @property
    def pre_rope(self) -> bool:
        return self.rope == "pre"

    @property
    def in_place(self) -> bool:
        return self.rope == "post"

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        key, value = Field((key_dim,), dtype, "key"), Field((value_dim,), dtype, "value")
        return Layout({"keys": key, "values": value})

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        return Encoded({"keys": batch.keys, "values": batch.values})

    def packed(self, key_dim: int, value_dim: int) -> tuple[None, None]:
        return None, None

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return stored.slot["keys"], stored.slot["values"]

"""Per-channel INT4 keys, per-token INT4 values: a page shares its key scales (not movable)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Field, Layout, PageBatch, PageFormat
from kvloom.core.policy import TILE
from kvloom.formats import _nibbles


@dataclass(frozen=True)
class Int4Channel(PageFormat):
    """Asymmetric 4-bit codes: keys per channel over the 64 tokens of a page, values per token.

    The axes of KIVI (arXiv:2402.02750): key outliers sit in channels, so a channel gets its own
    scale. Deviations: groups of 64 tokens instead of 32, keys and values of an entry seal
    together, and there is no residual window.
    """

    name: ClassVar[str] = "int4_channel"
    movable: ClassVar[bool] = False

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        if key_dim % 2 or value_dim % 2:
            raise ValueError(f"{self}: widths {key_dim} and {value_dim} must be even to pack")
        slot = {
            "key_codes": Field((key_dim // 2,), torch.uint8, "key"),
            "value_codes": Field((value_dim // 2,), torch.uint8, "value"),
            "value_scale": Field((2,), torch.float16, "value"),
        }
        return Layout(slot, {"key_scale": Field((2, key_dim), torch.float16, "key")})

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        codes, scale, low = _nibbles.quantize(batch.keys, dim=1)
        slot = {"key_codes": _nibbles.pack(codes)}
        sets = {"key_scale": torch.cat([scale, low], dim=1)}
        codes, scale, low = _nibbles.quantize(batch.values, dim=-1)
        slot["value_codes"] = _nibbles.pack(codes)
        slot["value_scale"] = torch.cat([scale, low], dim=-1)
        return Encoded(slot, sets, torch.arange(batch.keys.shape[0], device=batch.keys.device))

    def decode(
        self, slot: dict[str, Tensor], scale_set: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        codes = _nibbles.unpack(slot["key_codes"]).unflatten(-2, (-1, TILE))
        scale, low = scale_set["key_scale"].unbind(-2)
        keys = _nibbles.dequantize(codes, scale[..., None, :], low[..., None, :]).flatten(-3, -2)
        codes = _nibbles.unpack(slot["value_codes"])
        scale, low = slot["value_scale"].unbind(-1)
        values = _nibbles.dequantize(codes, scale[..., None], low[..., None])
        return keys.to(dtype), values.to(dtype)

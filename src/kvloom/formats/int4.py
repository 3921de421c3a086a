"""Per-token INT4: one scale and one minimum per token and head (movable)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Field, Layout, PageBatch, PageFormat
from kvloom.formats import _nibbles


@dataclass(frozen=True)
class Int4(PageFormat):
    """Asymmetric 4-bit codes per token and head, `x ~ code * scale + minimum`.

    The token-wise scheme of FlexGen (arXiv:2303.06865) with the group as wide as a head: 4.25
    effective bits at head_dim 128, 4.5 at 64. Every slot carries its own parameters, so survivors
    of eviction move without being encoded again.
    """

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        if key_dim % 2 or value_dim % 2:
            raise ValueError(f"{self}: widths {key_dim} and {value_dim} must be even to pack")
        fields = {}
        for part, width in (("key", key_dim), ("value", value_dim)):
            fields[f"{part}_codes"] = Field((width // 2,), torch.uint8, part)  # type: ignore[arg-type]
            fields[f"{part}_scale"] = Field((2,), torch.float16, part)  # type: ignore[arg-type]
        return Layout(fields)

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        slot = {}
        for part, x in (("key", batch.keys), ("value", batch.values)):
            codes, scale, low = _nibbles.quantize(x, dim=-1)
            slot[f"{part}_codes"] = _nibbles.pack(codes)
            slot[f"{part}_scale"] = torch.cat([scale, low], dim=-1)
        return Encoded(slot)

    def decode(
        self, slot: dict[str, Tensor], scale_set: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        parts = []
        for part in ("key", "value"):
            scale, low = slot[f"{part}_scale"].unbind(-1)
            codes = _nibbles.unpack(slot[f"{part}_codes"])
            parts.append(_nibbles.dequantize(codes, scale[..., None], low[..., None]).to(dtype))
        return parts[0], parts[1]

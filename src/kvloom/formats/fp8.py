"""FP8: e4m3 numbers with a scale per token.

    s = max |x| / 448,    code = e4m3(x / s)

4 exponent and 3 mantissa bits without infinities, 448 being the largest number (FP8 Formats for Deep
Learning, arXiv:2209.05433). Every channel keeps its own precision of 2^-4, whatever the loudest one is,
which integer codes with one scale per token do not; near the loudest, int8 is nine times as exact.

Deviations:
- The paper scales whole tensors. A scale per token needs no calibration, and tokens stay free to move.
- The scale is fp16: codes are made against the rounded scale, so that fp32 would only cost bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Field, Layout, PageBatch, PageFormat, Part, Stored
from kvloom.formats._grid import LEAST
from kvloom.kernels import cpu_encode, ops
from kvloom.kernels.layout import (
    LIMIT,
    TILE,
    Codes,
    Planes,
    cast,
    pack_keys,
    pack_values,
    tile_nbytes,
)
from kvloom.kernels.packed import PackedPart, Parameter

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


@dataclass(frozen=True)
class Fp8(PageFormat):
    """8-bit floating-point codes (e4m3) of keys and values, each token with its own fp16 scale."""

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        tile = {}
        widths: tuple[tuple[Part, int], ...] = (("key", key_dim), ("value", value_dim))
        for part, width in widths:
            codec = Codes(part, 8, width)
            tile[f"{part}_codes"] = Field((tile_nbytes(width, 8),), torch.uint8, part, codec)
            tile[f"{part}_scale"] = Field((1, TILE), torch.float16, part, Planes(), metadata=True)
        return Layout(tile=tile)

    def packed(self, key_dim: int, value_dim: int) -> tuple[PackedPart, PackedPart]:
        return _packed("key", key_dim), _packed("value", value_dim)

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        return Encoded(tile=_encode("key", batch.keys) | _encode("value", batch.values))

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            cast(_decode("key", stored, stored.key_dim), dtype),
            cast(_decode("value", stored, stored.value_dim), dtype),
        )


def _packed(part: Part, width: int) -> PackedPart:
    return PackedPart("fp8", 8, width, "token", f"{part}_codes", Parameter(f"{part}_scale"))


def _encode(part: Part, x: Tensor) -> dict[str, Tensor]:
    """Tile fields of pages `[N, 64, W]`."""
    by = cpu_encode.by_peaks if ops.cpu_encodes(x) else _by_torch
    codes, scale = by(x, part == "key")
    return {f"{part}_codes": codes, f"{part}_scale": scale}


def _by_torch(x: Tensor, keys: bool) -> tuple[Tensor, Tensor]:
    """Packed codes and scales `[N, 2, 1, 32]`; the definition."""
    x = x.float().unflatten(1, (-1, TILE))
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(LEAST, LIMIT).to(torch.float16)
    # out of range is NaN, not the largest number
    numbers = (x / scale.float()).clamp_(-LARGEST, LARGEST).to(E4M3)
    # few operators know fp8: it is stored, and moved, as bytes
    pack = pack_keys if keys else pack_values
    return pack(numbers.view(torch.uint8), 8), scale.transpose(2, 3)


def _decode(part: Part, stored: Stored, width: int) -> Tensor:
    """fp32 `[..., T * 32, width]`."""
    codes = Codes(part, 8, width).unpack(stored.tile[f"{part}_codes"])
    scale = stored.tile[f"{part}_scale"].transpose(-1, -2)
    return codes.view(E4M3).float().mul_(scale.float()).flatten(-3, -2)

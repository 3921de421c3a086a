"""Uniform grids: codes with a scale (and a zero point) per token or per channel.

    asymmetric  x ~ code * scale + zero,             zero = min, scale = (max - min) / (2^b - 1)
    symmetric   x ~ (code - 2^(b-1)) * scale,        scale = max |x| / (2^(b-1) - 1)

Scale and zero are fp16, and codes are made against their rounded values, so that inside the range
the error is half a step and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Field, Part
from kvloom.kernels.layout import (
    TILE,
    Codes,
    Planes,
    pack_keys,
    pack_values,
    tile_nbytes,
    unpack_keys,
    unpack_values,
)

LIMIT = torch.finfo(torch.float16).max
LEAST = 1e-7  # a scale that fp16 still holds; constant values have no other


def quantize(x: Tensor, bits: int, dim: int, symmetric: bool = False) -> tuple[Tensor, ...]:
    """Codes of `x` (uint8) and fp16 scale and zero of each slice along `dim`, kept as 1.

    Symmetric grids have no zero. Values beyond what fp16 parameters can span are clamped.
    """
    x = x.float()
    if symmetric:
        half = 1 << (bits - 1)
        peak = x.abs().amax(dim, keepdim=True)
        scale = (peak / (half - 1)).clamp(LEAST, LIMIT).to(torch.float16)
        codes = (x / scale.float()).round_().add_(half).clamp_(0, 2 * half - 1)
        return codes.to(torch.uint8), scale
    top = (1 << bits) - 1
    zero = x.amin(dim, keepdim=True).clamp(-LIMIT, LIMIT).to(torch.float16)
    span = x.amax(dim, keepdim=True) - zero.float()
    scale = (span / top).clamp(LEAST, LIMIT).to(torch.float16)
    codes = ((x - zero.float()) / scale.float()).round_().clamp_(0, top)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """fp32 values; `scale`, `zero` broadcast to `codes`, no zero: symmetric."""
    x = codes.float()  # in place from here on: this is what attention waits for
    if zero is None:
        return x.sub_(1 << (bits - 1)).mul_(scale.float())
    return x.mul_(scale.float()).add_(zero.float())


@dataclass(frozen=True)
class Grid:
    """How keys, or values, lie on uniform grids.

    Attributes:
        part: `"key"` or `"value"`. bits: 8, 4, 3 or 2.
        per: `"token"`: a scale for each token (and each `channels` channels); its slots can move.
            `"channel"`: a scale for each channel and `group` tokens, 32 or 64.
        channels: how many channels share a token's scale; 0: all.
    """

    part: Part
    bits: int
    per: str = "token"
    symmetric: bool = False
    group: int = 64
    channels: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return (f"{self.part}_scale",) + (() if self.symmetric else (f"{self.part}_zero",))

    def tile_fields(self, width: int) -> dict[str, Field]:
        codec = Codes(self.part, self.bits, width)
        nbytes = tile_nbytes(width, self.bits)
        fields = {f"{self.part}_codes": Field((nbytes,), torch.uint8, self.part, codec)}
        if self.per == "token":
            groups = self._groups(width)
            plane = Field((groups, TILE), torch.float16, self.part, Planes())
            fields.update(dict.fromkeys(self.names, plane))
        return fields

    def set_fields(self, width: int) -> dict[str, Field]:
        if self.per == "token":
            return {}
        return dict.fromkeys(self.names, Field((width,), torch.float16, self.part))

    def _groups(self, width: int) -> int:
        channels = self.channels or width
        if width % channels:
            raise ValueError(
                f"{self.part}s of width {width} cannot be split by {channels} channels"
            )
        return width // channels

    def encode(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pages `[N, 64, W]` as `(tile, sets)`: `[N, 2, ...]`, and `[N * 64 / group, W]` per field."""
        pack = pack_keys if self.part == "key" else pack_values
        if self.per == "channel":
            grouped = x.reshape(-1, self.group, x.shape[2])
            codes, *parameters = quantize(grouped, self.bits, 1, self.symmetric)
            sets = {n: p[:, 0] for n, p in zip(self.names, parameters, strict=True)}
            tile = {}
        else:
            grouped = x.unflatten(2, (self._groups(x.shape[2]), -1))
            codes, *parameters = quantize(grouped, self.bits, 3, self.symmetric)
            planes = (p[..., 0].unflatten(1, (-1, TILE)).transpose(2, 3) for p in parameters)
            sets, tile = {}, dict(zip(self.names, planes, strict=True))
        codes = codes.reshape(x.shape).unflatten(1, (-1, TILE))
        return {f"{self.part}_codes": pack(codes, self.bits), **tile}, sets

    def codes(self, tile: Tensor, width: int) -> Tensor:
        """Packed codes `[..., T, bytes]` as uint8 `[..., T, 32, width]`."""
        unpack = unpack_keys if self.part == "key" else unpack_values
        return unpack(tile, self.bits, width)

    def decode(self, tile: Mapping[str, Tensor], sets: Mapping[str, Tensor], width: int) -> Tensor:
        """fp32 `[..., T * 32, width]` from fields `[..., T, *shape]` (a set for each tile)."""
        codes = self.codes(tile[f"{self.part}_codes"], width)
        if self.per == "channel":
            parameters = [sets[name][..., None, :] for name in self.names]
        else:
            codes = codes.unflatten(-1, (self._groups(width), -1))
            parameters = [tile[name].transpose(-1, -2)[..., None] for name in self.names]
        scale, zero = parameters[0], None if self.symmetric else parameters[1]
        x = dequantize(codes, self.bits, scale, zero)
        return x.reshape(*x.shape[: tile[f"{self.part}_codes"].ndim - 2], -1, width)

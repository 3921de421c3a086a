"""Uniform grids: codes with a scale (and a zero point) per token or per channel.

    asymmetric  x ~ code * scale + zero,             zero = min, scale = (max - zero) / (2^b - 1)
    symmetric   x ~ (code - 2^(b-1)) * scale,        scale = max |x| / (2^(b-1) - 1)

Scale and zero are fp16, zero rounded down, and codes are made against their rounded values, so that
the error is half a step and no more, but for the rounding of the scale at the top of the range.

A group of 32 tokens is a tile, and its parameters lie with it; those of 64 form a set that the tiles
of a page refer to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.format import Field, Part
from kvloom.kernels import cpu_encode, ops
from kvloom.kernels.layout import (
    LIMIT,
    TILE,
    Codes,
    Planes,
    pack_keys,
    pack_values,
    tile_nbytes,
    unpack_keys,
    unpack_values,
)
from kvloom.kernels.packed import PackedPart, Parameter

if TYPE_CHECKING:
    from kvloom.formats._rotated import Turning

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
    zero = floor_half(x.amin(dim, keepdim=True))
    span = x.amax(dim, keepdim=True) - zero.float()
    scale = (span / top).clamp(LEAST, LIMIT).to(torch.float16)
    codes = ((x - zero.float()) / scale.float()).round_().clamp_(0, top)
    return codes.to(torch.uint8), scale, zero


def floor_half(x: Tensor) -> Tensor:
    """The largest fp16 number that is not above fp32 `x`, which is clamped to what fp16 holds.

    A zero point rounded to nearest may lie above the least number, by many steps where numbers have a
    bias (at 40, fp16 has steps of 1/32); below it, it only makes the range a little wider.
    """
    x = x.clamp(-LIMIT, LIMIT)
    near = x.to(torch.float16)
    bits = near.view(torch.int16)  # sign and magnitude: the next lower number is one further
    lower = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF))
    return torch.where(near.float() > x, lower.to(torch.int16).view(torch.float16), near)


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
        channels: how many channels share a token's scale, a multiple of 32 (the last group has what
            is left); 0: all.
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

    @property
    def _in_tile(self) -> bool:
        """Whether parameters lie with the codes of their tile, not in a set."""
        return self.per == "token" or self.group == TILE

    def tile_fields(self, width: int) -> dict[str, Field]:
        codec = Codes(self.part, self.bits, width)
        nbytes = tile_nbytes(width, self.bits)
        fields = {f"{self.part}_codes": Field((nbytes,), torch.uint8, self.part, codec)}
        if self.per == "token":
            plane = (-(-width // self._channels(width)), TILE)
            of_tokens = Field(plane, torch.float16, self.part, Planes(), metadata=True)
            fields.update(dict.fromkeys(self.names, of_tokens))
        elif self._in_tile:
            fields.update(self._of_channels(width))
        return fields

    def set_fields(self, width: int) -> dict[str, Field]:
        return {} if self._in_tile else self._of_channels(width)

    def _of_channels(self, width: int) -> dict[str, Field]:
        return dict.fromkeys(self.names, Field((width,), torch.float16, self.part, metadata=True))

    def _channels(self, width: int) -> int:
        return min(self.channels or width, width)

    def encode(
        self, x: Tensor, turning: Turning | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pages `[N, 64, W]`, rotated first if need be, as `(tile, sets)`: `[N, 2, ...]`, and `[N, W]` per
        field.
        """
        encode = ops.encoder(x)
        if encode is not None and turning is not None and ops.turns(encode):
            encode = partial(encode, turned=turning.arguments())
        elif turning is not None:
            x = turning(x)
            encode = ops.encoder(x)
        packed, parameters = self._by_torch(x) if encode is None else self._by_kernels(x, encode)
        named = dict(zip(self.names, parameters, strict=True))
        tile = {f"{self.part}_codes": packed}
        return (tile | named, {}) if self._in_tile else (tile, named)

    def _by_torch(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Packed codes and parameters; the definition."""
        pack = pack_keys if self.part == "key" else pack_values
        codes, parameters = self._per_channel(x) if self.per == "channel" else self._per_token(x)
        return pack(codes.unflatten(1, (-1, TILE)), self.bits), parameters

    def _by_kernels(
        self, x: Tensor, encode: Callable[..., None] = cpu_encode.by_ranges
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, bit by bit."""
        N, _, width = x.shape
        codes = x.new_empty(N, 2, tile_nbytes(width, self.bits), dtype=torch.uint8)
        shape: tuple[int, ...] = (N, width)
        if self.per == "token":
            shape = (N, 2, -(-width // self._channels(width)), TILE)
        elif self._in_tile:
            shape = (N, 2, width)
        parameters = [x.new_empty(shape, dtype=torch.float16) for _ in self.names]
        group = self.group if self.per == "channel" else self._channels(width)
        encode(x, codes, parameters, self.bits, self.part == "key", self.per == "token", group)
        return codes, parameters

    def _per_channel(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Codes `[N, 64, W]` and parameters, `[N, 2, W]` if they are of tiles, else `[N, W]`."""
        grouped = x.unflatten(1, (-1, self.group))
        codes, *parameters = quantize(grouped, self.bits, 2, self.symmetric)
        own = [p[:, :, 0] if self._in_tile else p[:, 0, 0] for p in parameters]
        return codes.flatten(1, 2), own

    def _per_token(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Codes `[N, 64, W]` and parameters `[N, 2, groups, 32]`."""
        width = x.shape[2]
        channels = self._channels(width)
        missing = -width % channels
        if missing:  # copies change neither the least nor the largest of the last group
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:2], missing)], 2)
        codes, *parameters = quantize(x.unflatten(2, (-1, channels)), self.bits, 3, self.symmetric)
        planes = [p[..., 0].unflatten(1, (-1, TILE)).transpose(2, 3) for p in parameters]
        return codes.flatten(2)[..., :width], planes

    def packed(self, width: int, family: str) -> PackedPart:
        """How kernels read it; `family`: of the sets."""
        home = "tile" if self._in_tile else family
        named = [Parameter(name, home) for name in self.names]
        return PackedPart(
            "uniform", self.bits, width, self.per, f"{self.part}_codes", named[0],
            None if self.symmetric else named[1],
            group=self._channels(width) if self.per == "token" else 0,
            middle=1 << (self.bits - 1) if self.symmetric else 0,
        )  # fmt: skip

    def codes(self, tile: Tensor, width: int) -> Tensor:
        """Packed codes `[..., T, bytes]` as uint8 `[..., T, 32, width]`."""
        unpack = unpack_keys if self.part == "key" else unpack_values
        return unpack(tile, self.bits, width)

    def decode(self, tile: Mapping[str, Tensor], sets: Mapping[str, Tensor], width: int) -> Tensor:
        """fp32 `[..., T * 32, width]` from fields `[..., T, *shape]` (a set for each tile)."""
        codes = self.codes(tile[f"{self.part}_codes"], width)
        held = tile if self._in_tile else sets
        parameters = [self._spread(held[name], width) for name in self.names]
        scale, zero = parameters[0], None if self.symmetric else parameters[1]
        return dequantize(codes, self.bits, scale, zero).flatten(-3, -2)

    def _spread(self, parameter: Tensor, width: int) -> Tensor:
        """Parameters as they broadcast to codes `[..., T, 32, width]`."""
        if self.per == "channel":
            return parameter[..., None, :]
        groups = parameter.transpose(-1, -2)
        if groups.shape[-1] == 1:
            return groups
        return groups.repeat_interleave(self._channels(width), -1)[..., :width]

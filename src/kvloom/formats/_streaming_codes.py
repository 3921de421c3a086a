"""Codes with given scales per channel, and side planes for the channels that do not fit them.

    codes   q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1),   s = e / (2^(b-1) - 1)
    plane   the same with more bits and the scale of the chunk's own absmax, for a few channels

A plane belongs to a tile: the numbers of up to `room` channels, their scales and their ids. A tile
without outliers has none. What a plane holds replaces what the codes say of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import TILES, Field, Part, Sets
from kvloom.formats._grid import LEAST, dequantize
from kvloom.kernels import cpu_encode, ops
from kvloom.kernels.layout import (
    LIMIT,
    TILE,
    Codes,
    pack_keys,
    pack_values,
    tile_nbytes,
    unpack_keys,
    unpack_values,
)
from kvloom.kernels.packed import PackedPart, Parameter

EXACT = 16  # bits that mean no quantization


def scale_of(peak: Tensor, bits: int) -> Tensor:
    """fp16 scale of a symmetric grid up to `peak`."""
    return (peak / ((1 << bits - 1) - 1)).clamp(LEAST, LIMIT).to(torch.float16)


def levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Whole numbers from -2^(b-1) to 2^(b-1) - 1, fp32."""
    half = 1 << bits - 1
    return (x / scale.float()).round_().clamp_(-half, half - 1)


@dataclass(frozen=True)
class Channels:
    """How keys, or values, are stored.

    Attributes:
        part: `"key"` or `"value"`. bits: 8, 4, 3 or 2; 16: exact, in the model's dtype.
        groups: groups of channels that share a scale; 0: each has its own.
        room: channels of a plane; 0: no planes. plane_bits: 2 to 8 (a byte each), or 16 (fp16).
    """

    part: Part
    bits: int
    groups: int
    room: int
    plane_bits: int

    @property
    def exact(self) -> bool:
        return self.bits == EXACT

    @property
    def family(self) -> str:
        """Of the planes' sets."""
        return f"{self.part}_outliers"

    def tile_fields(self, width: int) -> dict[str, Field]:
        codec = Codes(self.part, self.bits, width)
        shape = (tile_nbytes(width, self.bits),)
        return {f"{self.part}_codes": Field(shape, torch.uint8, self.part, codec)}

    def set_fields(self, width: int) -> dict[str, Field]:
        if self.groups and width % self.groups:
            raise ValueError(
                f"{self.part}s of width {width} cannot be split into {self.groups} equal groups"
            )
        return {f"{self.part}_scale": self._parameter(self.groups or width, torch.float16)}

    def plane_fields(self, width: int) -> dict[str, Field]:
        n = min(self.room, width)
        exact = self.plane_bits == EXACT
        dtype = torch.float16 if exact else torch.int8
        fields = {f"{self.part}_plane": Field((TILE, n), dtype, self.part)}
        if not exact:
            fields[f"{self.part}_plane_scale"] = self._parameter(n, torch.float16)
        ids = torch.uint8 if width <= 256 else torch.int16
        return fields | {f"{self.part}_plane_ids": self._parameter(n, ids)}

    def _parameter(self, n: int, dtype: torch.dtype) -> Field:
        return Field((n,), dtype, self.part, metadata=True)

    def packed(self, width: int, scales: str) -> PackedPart:
        """How kernels read it; `scales`: the family of the channels' scales."""
        return PackedPart(
            "uniform", self.bits, width, "channel", f"{self.part}_codes",
            Parameter(f"{self.part}_scale", scales),
            group=width // self.groups if self.groups else 0,
            middle=1 << (self.bits - 1),
            plane=(self.family, f"{self.part}_plane") if self.room else None,
        )  # fmt: skip

    # -- encoding --------------------------------------------------------------------------------

    def encode(
        self, x: Tensor, of: Tensor, e: Tensor, planes: Planes | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pages `x [N, 64, W]` of chunks `of [N]`: codes `[N, 2, ..]` and scales `[M, ..]`.

        `e [M, W]`: the absmax that scales are made of, channels in `planes` left out.
        """
        width = x.shape[2]
        peak = e if planes is None else e.masked_fill(planes.taken, 0)
        if self.groups:
            peak = peak.unflatten(1, (self.groups, -1)).amax(2)
        scale = scale_of(peak, self.bits)
        each = self._each(scale, width)
        if ops.cpu_encodes(x):
            tiles = cpu_encode.by_scales(x, each, of, self.bits, self.part == "key")
        else:
            codes = levels(x.float(), each[of][:, None], self.bits).add_(1 << self.bits - 1)
            pack = pack_keys if self.part == "key" else pack_values
            tiles = pack(codes.to(torch.uint8).unflatten(1, (TILES, TILE)), self.bits)
        return {f"{self.part}_codes": tiles}, {f"{self.part}_scale": scale}

    def _each(self, scale: Tensor, width: int) -> Tensor:
        """Scales `[..., groups]` of every channel, `[..., W]`."""
        return scale.repeat_interleave(width // self.groups, -1) if self.groups else scale

    def encode_planes(self, x: Tensor, of: Tensor, planes: Planes) -> Sets:
        """A plane for each tile of the pages whose chunk has outliers."""
        width, pages = x.shape[2], planes.chunk_has[of].nonzero()[:, 0]
        ids = planes.ids[of[pages]]
        found = x[pages].float().gather(2, ids[:, None].expand(-1, x.shape[1], -1))
        fields = {}
        if self.plane_bits == EXACT:
            plane = found.clamp(-LIMIT, LIMIT).to(torch.float16)
        else:
            scale = scale_of(planes.peak[of[pages]], self.plane_bits)
            plane = levels(found, scale[:, None], self.plane_bits).to(torch.int8)
            fields[f"{self.part}_plane_scale"] = scale.repeat_interleave(TILES, 0)
        fields[f"{self.part}_plane"] = plane.reshape(-1, TILE, ids.shape[1])
        dtype = self.plane_fields(width)[f"{self.part}_plane_ids"].dtype
        fields[f"{self.part}_plane_ids"] = ids.to(dtype).repeat_interleave(TILES, 0)
        own = torch.full((len(x), TILES), -1, device=x.device)
        own[pages] = torch.arange(len(pages) * TILES, device=x.device).view(-1, TILES)
        return Sets(fields, own)

    # -- decoding --------------------------------------------------------------------------------

    def decode(
        self,
        tile: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        planes: Mapping[str, Tensor] | None,
        has: Tensor | None,
        width: int,
    ) -> Tensor:
        """fp32 `[..., T * 32, W]` from fields `[..., T, ..]`; `has [..., T]`: who has a plane."""
        unpack = unpack_keys if self.part == "key" else unpack_values
        codes = unpack(tile[f"{self.part}_codes"], self.bits, width)
        scale = self._each(scales[f"{self.part}_scale"], width)
        x = dequantize(codes, self.bits, scale[..., None, :], None)
        if planes is not None and has is not None:
            plane = planes[f"{self.part}_plane"].float()
            if self.plane_bits != EXACT:
                plane = plane * planes[f"{self.part}_plane_scale"].float()[..., None, :]
            ids = planes[f"{self.part}_plane_ids"].long()[..., None, :].expand(plane.shape)
            x = torch.where(has[..., None, None], x.scatter(-1, ids, plane), x)
        return x.flatten(-3, -2)

    def count(self, planes: Mapping[str, Tensor]) -> Tensor:
        """Elements that each plane stands for, `[...]`."""
        ids = planes[f"{self.part}_plane_ids"]
        return TILE * (1 + (ids[..., 1:] != ids[..., :1]).sum(-1))


@dataclass(frozen=True)
class Planes:
    """Which channels of M chunks go to planes.

    Attributes:
        ids: int64 `[M, n]`, the outliers; where there are fewer than n, the first again.
        peak: `[M, n]`, their absmax in the chunk. chunk_has: bool `[M]`. taken: bool `[M, W]`.
    """

    ids: Tensor
    peak: Tensor
    chunk_has: Tensor
    taken: Tensor

    @classmethod
    def of(cls, severity: Tensor, a: Tensor, room: int) -> Planes:
        """The `room` channels that are farthest above their threshold (above 1); ties: the lower."""
        order = severity.argsort(dim=1, descending=True, stable=True)[:, :room]
        over = severity.gather(1, order) > 1
        ids = torch.where(over, order, order[:, :1])
        taken = torch.zeros_like(a, dtype=torch.bool).scatter(1, ids, over[:, :1].expand_as(ids))
        return cls(ids, a.gather(1, ids), over[:, 0], taken)

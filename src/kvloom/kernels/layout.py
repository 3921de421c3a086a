"""How codes of 8, 4, 3 and 2 bits lie in memory: the layout that vector kernels read.

The unit is a tile: 32 tokens of one (row, KV head). Its codes are packed as *panels* of quads x 2
halves x 64 codes. The 64 codes of one (quad, half) are 16 lanes x 4 consecutive elements of the
reduction, which is what one 64-byte dot-product instruction takes; code o = 4 * lane + e.

    keys    lane = token, reduction = channel:  one panel per tile
            half = t / 16, lane = t % 16, quad = c / 4, e = c % 4
    values  lane = channel, reduction = token:  one panel for each 32 channels
            half = c % 32 / 16, lane = c % 16, quad = t / 4, e = t % 4
            the last 16 of a width that is an odd multiple of 16 have a panel of their own, whose
            halves are odd and even quads: quad = t / 8, half = t / 4 % 2

Bytes of a panel (o = 0..63; A, B: halves; 0, 1, ..: quads):

    8 bits  A0[o] B0[o] | A1[o] B1[o] | ..              128 bytes for each quad
    4 bits  A0[o] + 16 B0[o] | ..                         64 bytes for each quad
    2 bits  A0[o] + 4 B0[o] + 16 A1[o] + 64 B1[o] | ..    64 bytes for each 2 quads
    3 bits  the low 2 bits of quads 0, 1 and of quads 2, 3 as above, then the high bits
            A0 + 2 A1 + 4 B0 + 8 B1 + 16 A2 + 32 A3 + 64 B2 + 128 B3:  192 bytes for 4 quads

Widths that are not multiples of 16 are padded with zeros up to the next one. `code_k` and `code_v`
are the definition, code by code; `pack_keys` .. `unpack_values` do the same for whole tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TILE = 32  # slots that stand and fall together where they share scales

BITS = (8, 4, 3, 2)
LIMIT = torch.finfo(torch.float16).max
LANES = 16
GRAIN = 16  # channels to which widths are padded


def padded(width: int) -> int:
    """The width that is stored for `width` channels."""
    return -(-width // GRAIN) * GRAIN


def tile_nbytes(width: int, bits: int) -> int:
    """Bytes of the codes of one tile."""
    return TILE * padded(width) * bits // 8


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `x` in `dtype`. What was rounded may lie past the end of fp16: it saturates."""
    return x.clamp(-LIMIT, LIMIT).half() if dtype == torch.float16 else x.to(dtype)


# -- the definition ------------------------------------------------------------------------------


def code_k(tile: Tensor, bits: int, t: int, c: int) -> int:
    """Code of token t, channel c in the bytes of a tile of keys."""
    return _code(tile, bits, c // 4, t // LANES, (t % LANES) * 4 + c % 4)


def code_v(tile: Tensor, bits: int, width: int, t: int, c: int) -> int:
    """Code of token t, channel c in the bytes of a tile of values of this width."""
    panel = tile[c // 32 * (32 * TILE * bits // 8) :]
    o = (c % LANES) * 4 + t % 4
    if c // 32 == padded(width) // 32:  # the panel of the last 16 channels
        return _code(panel, bits, t // 8, t // 4 % 2, o)
    return _code(panel, bits, t // 4, c % 32 // LANES, o)


def _code(panel: Tensor, bits: int, quad: int, half: int, o: int) -> int:
    def byte(vector: int) -> int:
        return int(panel[vector * 64 + o])

    if bits == 8:
        return byte(quad * 2 + half)
    if bits == 4:
        return byte(quad) >> (4 * half) & 15
    if bits == 2:
        return byte(quad // 2) >> (2 * half + 4 * (quad % 2)) & 3
    low = byte(quad // 4 * 3 + quad % 4 // 2) >> (2 * half + 4 * (quad % 2)) & 3
    high = byte(quad // 4 * 3 + 2) >> ((0, 1, 4, 5)[quad % 4] + 2 * half) & 1
    return low + 4 * high


# -- whole tensors -------------------------------------------------------------------------------


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """`[..., 32, D]` codes (any integer dtype) -> uint8 `[..., tile_nbytes]`."""
    flat, lead = _widened(codes), codes.shape[:-2]
    halves = flat.view(len(flat), 2, LANES, flat.shape[2] // 4, 4)  # half, lane, quad, e
    packed = _pack(halves.permute(0, 3, 1, 2, 4).flatten(3), bits)
    return packed.view(*lead, tile_nbytes(codes.shape[-1], bits))


def unpack_keys(tile: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack_keys`: uint8 `[..., 32, D]`."""
    flat = tile.reshape(-1, tile.shape[-1])
    quads = _unpack(flat, bits).unflatten(-1, (LANES, 4))  # quad, half, lane, e
    codes: Tensor = quads.permute(0, 2, 3, 1, 4).reshape(*tile.shape[:-1], TILE, padded(width))
    return codes[..., :width]


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """`[..., 32, E]` codes -> uint8 `[..., tile_nbytes]`."""
    flat, lead = _widened(codes), codes.shape[:-2]
    n, panels = len(flat), flat.shape[2] // 32
    whole = panels * 32
    full = flat[:, :, :whole].reshape(n, 8, 4, panels, 2, LANES)  # quad, e, panel, half, lane
    full = full.permute(0, 3, 1, 4, 5, 2).reshape(n * panels, 8, 2, 64)
    parts = [_pack(full, bits).view(n, panels * tile_nbytes(32, bits))]
    if whole < flat.shape[2]:
        last = flat[:, :, whole:].reshape(n, 4, 2, 4, LANES)  # quad, half, e, lane
        parts.append(_pack(last.transpose(3, 4).flatten(3), bits))
    return torch.cat(parts, 1).view(*lead, tile_nbytes(codes.shape[-1], bits))


def unpack_values(tile: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack_values`: uint8 `[..., 32, E]`."""
    flat = tile.reshape(-1, tile.shape[-1])
    panels, each = padded(width) // 32, tile_nbytes(32, bits)
    n, whole = len(flat), panels * each
    full = _unpack(flat[:, :whole].reshape(n * panels, each), bits)
    full = full.view(n, panels, 8, 2, LANES, 4)  # panel, quad, half, lane, e
    parts = [full.permute(0, 2, 5, 1, 3, 4).reshape(n, TILE, panels * 32)]
    if padded(width) % 32:
        last = _unpack(flat[:, whole:], bits).view(n, 4, 2, LANES, 4)  # quad, half, lane, e
        parts.append(last.transpose(3, 4).reshape(n, TILE, LANES))
    codes: Tensor = torch.cat(parts, 2) if panels and len(parts) > 1 else parts[-1]
    return codes.view(*tile.shape[:-1], TILE, padded(width))[..., :width]


def _widened(codes: Tensor) -> Tensor:
    """`[N, 32, padded]` uint8."""
    flat = codes.to(torch.uint8).reshape(-1, *codes.shape[-2:])
    missing = padded(codes.shape[-1]) - codes.shape[-1]
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def _pack(panel: Tensor, bits: int) -> Tensor:
    """`[N, quads, 2, 64]` -> the bytes of N panels, `[N, ...]`."""
    if bits == 8:
        return panel.flatten(1)
    if bits == 4:
        return (panel[:, :, 0] | panel[:, :, 1] << 4).flatten(1)
    if bits == 2:
        return _pack_pairs(panel).flatten(1)
    n, quads = panel.shape[:2]
    low = _pack_pairs(panel & 3).view(n, quads // 4, 2, 64)
    high = (panel >> 2).view(n, quads // 4, 4, 2, 64) << HIGH.to(panel.device)
    high = high.sum((2, 3), dtype=torch.uint8)[:, :, None]
    return torch.cat([low, high], 2).flatten(1)


# place of the high bit of a 3-bit code in its byte: [quad % 4, half]
HIGH = torch.tensor([[0, 2], [1, 3], [4, 6], [5, 7]], dtype=torch.uint8)[..., None]


def _pack_pairs(panel: Tensor) -> Tensor:
    """2-bit codes `[N, quads, 2, 64]` of two quads in one byte, `[N, quads / 2, 64]`."""
    (a0, b0), (a1, b1) = (panel[:, i::2].unbind(2) for i in (0, 1))
    packed: Tensor = a0 | b0 << 2 | a1 << 4 | b1 << 6
    return packed


def _unpack(panel: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    vectors = panel.shape[1] // 64
    each: Tensor = panel.unflatten(1, (vectors, 64))
    if bits == 8:
        return panel.reshape(len(panel), vectors // 2, 2, 64)
    if bits == 4:
        return torch.stack([each & 15, each >> 4], 2)
    if bits == 2:
        return _unpack_pairs(each)
    groups = each.unflatten(1, (vectors // 3, 3))
    low = _unpack_pairs(groups[:, :, :2].flatten(1, 2))
    high = groups[:, :, 2, None, None] >> HIGH.to(panel.device) & 1
    codes: Tensor = low | high.flatten(1, 2) << 2
    return codes


def _unpack_pairs(vectors: Tensor) -> Tensor:
    shifts = torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8, device=vectors.device)
    pairs: Tensor = vectors[:, :, None, None] >> shifts[..., None] & 3  # pair, quad % 2, half, o
    return pairs.flatten(1, 2)


# -- taking tiles apart --------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """Codec of a tile field of packed codes of keys or values."""

    part: Literal["key", "value"]
    bits: int
    width: int

    def unpack(self, tiles: Tensor) -> Tensor:
        unpack = unpack_keys if self.part == "key" else unpack_values
        return unpack(tiles, self.bits, self.width)

    def pack(self, slots: Tensor) -> Tensor:
        return (pack_keys if self.part == "key" else pack_values)(slots, self.bits)


@dataclass(frozen=True)
class Planes:
    """Codec of a tile field `[groups, 32]`: numbers that belong to tokens, side by side."""

    def unpack(self, tiles: Tensor) -> Tensor:
        return tiles.transpose(-1, -2)

    def pack(self, slots: Tensor) -> Tensor:
        return slots.transpose(-1, -2)

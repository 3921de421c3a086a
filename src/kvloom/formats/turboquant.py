"""TurboQuant, the variant for mean squared error (arXiv:2504.19874).

    u = R x / |x|,    code_c = the cell of sqrt(d) u_c,    x ~ |x| R' q / |q|,    q_c = level[code_c]

A random rotation R makes every coordinate of a unit vector nearly N(0, 1/d), whatever the vector, so
that one codebook fits all of them: the Lloyd-Max quantizer of the normal distribution.

Deviations:
- No second stage: the paper's other variant spends a bit on the residual's signs (QJL), which makes dot
  products unbiased but noisier, and noise is what attention suffers from.
- R is a randomised Hadamard rotation, drawn per layer and KV head, and both keys and values are rotated.
- The levels are those of N(0, 1), the limit for wide heads, instead of each width's own marginal.
- Whole bits only: the paper's 2.5 and 3.5 give a quarter of the channels, the loud ones, one bit more.
- The decoded vector has the norm of the original: |x| / |q| is stored, an fp16 number per token in place
  of the norm, so that decoding is a look-up and one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import TILES, Encoded, Field, Layout, PageBatch, Part, Stored
from kvloom.core.policy import check, one_of
from kvloom.formats._levels import between, code, lloyd_max
from kvloom.formats._rotated import Rotated
from kvloom.kernels.layout import LIMIT, TILE, Codes, Planes, cast, tile_nbytes
from kvloom.kernels.packed import PackedPart, Parameter, Parts

BITS = (4, 3, 2)


@dataclass(frozen=True)
class TurboquantMSE(Rotated):
    """Rotated unit vectors on a fixed codebook, with one fp16 number per token.

    Attributes:
        bits: of a key's code, 4, 3 or 2. value_bits: of a value's, if others.
        seed: of the rotation's signs.
    """

    bits: int = 4
    value_bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, one_of(self.bits, BITS), f"bits is one of {BITS}")
        known = self.value_bits is None or one_of(self.value_bits, BITS)
        check(self, known, f"value_bits is one of {BITS}")
        check(self, type(self.seed) is int and self.seed >= 0, "seed is an int >= 0")

    @property
    def rotated(self) -> tuple[Part, ...]:
        return ("key", "value")

    def _codes(self, key_dim: int, value_dim: int) -> tuple[Codes, Codes]:
        value_bits = self.bits if self.value_bits is None else self.value_bits
        return Codes("key", self.bits, key_dim), Codes("value", value_bits, value_dim)

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        tile = {}
        for codes in self._codes(key_dim, value_dim):
            part, nbytes = codes.part, tile_nbytes(codes.width, codes.bits)
            tile[f"{part}_codes"] = Field((nbytes,), torch.uint8, part, codes)
            tile[f"{part}_scale"] = Field((1, TILE), torch.float16, part, Planes(), metadata=True)
        return Layout(tile=tile)

    def packed(self, key_dim: int, value_dim: int) -> Parts:
        keys, values = (_packed(codes) for codes in self._codes(key_dim, value_dim))
        return keys, values

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        codes, tile = self._codes(batch.keys.shape[2], batch.values.shape[2]), {}
        for codec, x in zip(codes, self.in_basis(batch), strict=True):
            tile.update(_encode(codec, x))
        return Encoded(tile=tile)

    def read(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self._codes(stored.key_dim, stored.value_dim)
        return cast(_decode(keys, stored), dtype), cast(_decode(values, stored), dtype)


def _packed(codec: Codes) -> PackedPart:
    scale, table = Parameter(f"{codec.part}_scale"), lloyd_max(codec.bits, torch.device("cpu"))
    codes = f"{codec.part}_codes"
    return PackedPart("levels", codec.bits, codec.width, "token", codes, scale, levels=table)


def _encode(codec: Codes, x: Tensor) -> dict[str, Tensor]:
    """Tile fields of rotated fp32 `[N, 64, W]`."""
    level = lloyd_max(codec.bits, x.device)
    norm = x.norm(dim=-1)
    size = norm.clamp_min(torch.finfo(torch.float32).tiny)
    coordinate = x * (x.shape[-1] ** 0.5 / size)[..., None]
    of = torch.zeros(len(x), dtype=torch.int64)
    codes, coded = code(codec.part, coordinate, between(level)[None], of, level)
    scale = (norm / coded).clamp_max(LIMIT).to(torch.float16)
    return {f"{codec.part}_codes": codes, f"{codec.part}_scale": scale.view(-1, TILES, 1, TILE)}


def _decode(codec: Codes, stored: Stored) -> Tensor:
    """fp32 `[..., T * 32, width]`, in the rotated basis."""
    level = lloyd_max(codec.bits, stored.tile[f"{codec.part}_codes"].device)
    codes = codec.unpack(stored.tile[f"{codec.part}_codes"])
    scale = stored.tile[f"{codec.part}_scale"].transpose(-1, -2)
    return level[codes.int()].mul_(scale.float()).flatten(-3, -2)

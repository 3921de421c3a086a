"""What int8, int4, int3 and int2 have in common: uniform grids for keys and for values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Layout, PageBatch, PageFormat, Place, Sets, Stored
from kvloom.core.policy import check
from kvloom.formats import _hadamard
from kvloom.formats._grid import Grid
from kvloom.kernels.layout import BITS


@dataclass(frozen=True)
class Uniform(PageFormat, ABC):
    """Integer codes with fp16 scales.

    Attributes:
        value_bits: bits of the values, if other than those of the keys: `int8(value_bits=4)` is
            what is called K8V4.
        keys, values: `"token"` or `"channel"`: what has a scale of its own. Per token, survivors of
            eviction move; per channel, `group` tokens share scales and go or stay by tiles of 32.
        symmetric: scales without zero points.
        group: tokens that share a channel's scale, 32 or 64.
        channels: channels that share a token's scale; 0: all of a head.
        hadamard: `""`, `"keys"` or `"both"`: store keys (and values) in a rotated basis, which
            spreads outliers; queries and outputs are rotated instead of what is stored.
        seed: of the rotation's signs.
    """

    value_bits: int | None = None
    keys: str = "token"
    values: str = "token"
    symmetric: bool = False
    group: int = 64
    channels: int = 0
    hadamard: str = ""
    seed: int = 0

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a key's code."""

    def __post_init__(self) -> None:
        check(self, self.value_bits in (None, *BITS), f"value_bits is one of {BITS}")
        for per in (self.keys, self.values):
            check(self, per in ("token", "channel"), "keys and values are 'token' or 'channel'")
        check(self, self.group in (32, 64), "group is 32 or 64 tokens")
        whole = type(self.channels) is int and self.channels >= 0
        check(self, whole, "channels is an int >= 0")
        check(self, self.hadamard in ("", "keys", "both"), "hadamard is '', 'keys' or 'both'")
        check(self, type(self.seed) is int and self.seed >= 0, "seed is an int >= 0")

    @property
    def movable(self) -> bool:
        return self.keys == self.values == "token"

    @property
    def turns(self) -> bool:
        return bool(self.hadamard)

    @property
    def _grids(self) -> tuple[Grid, Grid]:
        bits = self.bits if self.value_bits is None else self.value_bits
        shared = (self.symmetric, self.group, self.channels)
        return (
            Grid("key", self.bits, self.keys, *shared),
            Grid("value", bits, self.values, *shared),
        )

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        keys, values = self._grids
        shared = {**keys.set_fields(key_dim), **values.set_fields(value_dim)}
        tile = {**keys.tile_fields(key_dim), **values.tile_fields(value_dim)}
        return Layout(tile=tile, sets={"scales": shared} if shared else {})

    def tables(self, place: Place, device: torch.device) -> dict[str, Tensor]:
        made = {}
        if self.hadamard:
            made["key_signs"] = _hadamard.signs(place, place.key_dim, 2 * self.seed, device)
        if self.hadamard == "both":
            made["value_signs"] = _hadamard.signs(place, place.value_dim, 2 * self.seed + 1, device)
        return made

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        tile, shared = {}, {}
        for grid, x in zip(self._grids, (batch.keys, batch.values), strict=True):
            if f"{grid.part}_signs" in batch.tables:
                x = _hadamard.turn(x, batch.tables[f"{grid.part}_signs"][batch.head][:, None])
            fields, sets = grid.encode(x)
            tile.update(fields)
            shared.update(sets)
        if not shared:
            return Encoded(tile=tile)
        n = next(iter(shared.values())).shape[0]
        of = torch.arange(n, device=batch.keys.device).view(len(batch.keys), -1)
        return Encoded(tile=tile, sets={"scales": Sets(shared, of[:, 0] if n == len(of) else of)})

    def read(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self._grids
        shared = stored.sets.get("scales", {})
        return (
            keys.decode(stored.tile, shared, stored.key_dim).to(dtype),
            values.decode(stored.tile, shared, stored.value_dim).to(dtype),
        )

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not self.turns:
            return self.read(stored, dtype)
        keys, values = self.read(stored, torch.float32)
        keys = _hadamard.turn_back(keys, stored.tables["key_signs"][:, None])
        if "value_signs" in stored.tables:
            values = _hadamard.turn_back(values, stored.tables["value_signs"][:, None])
        return keys.to(dtype), values.to(dtype)

    def turn_query(self, query: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        if not self.hadamard:
            return query
        return _hadamard.turn(query, tables["key_signs"][:, None, None]).to(query.dtype)

    def turn_back(self, out: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        if self.hadamard != "both":
            return out
        return _hadamard.turn_back(out, tables["value_signs"][:, None, None]).to(out.dtype)

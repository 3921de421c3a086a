"""What formats on uniform grids have in common, and the parameters of int8, int4, int3 and int2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Layout, PageBatch, Part, Sets, Stored
from kvloom.core.policy import check, one_of
from kvloom.formats._grid import Grid
from kvloom.formats._rotated import Rotated
from kvloom.kernels.layout import BITS, cast
from kvloom.kernels.packed import PackedPart

SCALES = "scales"  # the family of sets


class Gridded(Rotated, ABC):
    """Keys on one grid and values on another, in the model's basis unless `rotated` says otherwise."""

    @property
    @abstractmethod
    def grids(self) -> tuple[Grid, Grid]:
        """Of keys, and of values."""

    @property
    def rotated(self) -> tuple[Part, ...]:
        return ()

    @property
    def movable(self) -> bool:
        return all(grid.per == "token" for grid in self.grids)

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        keys, values = self.grids
        tile = keys.tile_fields(key_dim) | values.tile_fields(value_dim)
        shared = keys.set_fields(key_dim) | values.set_fields(value_dim)
        return Layout(tile=tile, sets={SCALES: shared} if shared else {})

    def packed(self, key_dim: int, value_dim: int) -> tuple[PackedPart, PackedPart]:
        keys, values = self.grids
        return keys.packed(key_dim, SCALES), values.packed(value_dim, SCALES)

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        tile, shared = {}, {}
        both = batch.keys, batch.values
        for grid, x, turning in zip(self.grids, both, self.turnings(batch), strict=True):
            fields, sets = grid.encode(x, turning)
            tile.update(fields)
            shared.update(sets)
        if not shared:
            return Encoded(tile=tile)
        own = torch.arange(len(batch.keys), device=batch.keys.device)
        return Encoded(tile=tile, sets={SCALES: Sets(shared, own)})

    def read(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self.grids
        shared = stored.sets.get(SCALES, {})
        return (
            cast(keys.decode(stored.tile, shared, stored.key_dim), dtype),
            cast(values.decode(stored.tile, shared, stored.value_dim), dtype),
        )


@dataclass(frozen=True)
class Uniform(Gridded, ABC):
    """Integer codes with fp16 scales.

    Attributes:
        value_bits: bits of a value's code, if other than a key's.
        keys: `"token"` or `"channel"`: what has a scale of its own. Per token, survivors of eviction
            move; per channel, `group` tokens share scales and go or stay by tiles of 32.
        values: likewise.
        symmetric: scales without zero points.
        group: tokens that share a channel's scale, 32 or 64; only with a scale per channel.
        channels: channels that share a token's scale, a multiple of 32, which is how many channels
            of values lie together in memory (the last group has what is left); 0: all of a head.
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
        known = self.value_bits is None or one_of(self.value_bits, BITS)
        check(self, known, f"value_bits is one of {BITS}")
        for per in (self.keys, self.values):
            check(self, per in ("token", "channel"), "keys and values are 'token' or 'channel'")
        check(self, type(self.symmetric) is bool, "symmetric is True or False")
        check(self, one_of(self.group, (32, 64)), "group is 32 or 64 tokens")
        whole = type(self.channels) is int and self.channels >= 0 and self.channels % 32 == 0
        check(self, whole, "channels is a multiple of 32, or 0 for all")
        check(self, self.hadamard in ("", "keys", "both"), "hadamard is '', 'keys' or 'both'")
        check(self, type(self.seed) is int and self.seed >= 0, "seed is an int >= 0")
        self._check_read()

    def _check_read(self) -> None:
        """Raise ValueError if a parameter is given that nothing would read."""
        axes, group, channels = (self.keys, self.values), self.group, self.channels
        per_token = (
            "group says how many tokens share a channel's scale, and all scales are per token"
        )
        check(self, "channel" in axes or group == 64, per_token)
        per_channel = "channels says how many share a token's scale, and all scales are per channel"
        check(self, "token" in axes or channels == 0, per_channel)
        check(self, bool(self.hadamard) or self.seed == 0, "seed is of a rotation: name `hadamard`")

    @property
    def rotated(self) -> tuple[Part, ...]:
        if self.hadamard == "both":
            return ("key", "value")
        return ("key",) if self.hadamard else ()

    @property
    def grids(self) -> tuple[Grid, Grid]:
        bits = self.bits if self.value_bits is None else self.value_bits
        shared = (self.symmetric, self.group, self.channels)
        return (
            Grid("key", self.bits, self.keys, *shared),
            Grid("value", bits, self.values, *shared),
        )

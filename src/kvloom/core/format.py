"""`PageFormat`: how the survivors of one page are stored, and what that costs in bytes.

A page is 64 slots of one (row, KV head), as two tiles of 32. A format names its fields, encodes
whole pages once, decodes any run of tiles, and owns its byte arithmetic. A field belongs to a slot,
to a tile, or to a set that several tiles share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from kvloom.core.policy import Policy
from kvloom.kernels.layout import TILE
from kvloom.kernels.packed import Parts
from kvloom.positions.rope import RopeSpec

PAGE = 64
TILES = PAGE // TILE
Part = Literal["key", "value"]


class Codec(Protocol):
    """How the slots of a tile field can be taken apart, and put together again bit by bit."""

    def unpack(self, tiles: Tensor) -> Tensor:
        """`[N, *shape]` -> `[N, 32, width]`."""

    def pack(self, slots: Tensor) -> Tensor:
        """The inverse of `unpack`."""


@dataclass(frozen=True)
class Field:
    """One stored tensor: its shape per slot, tile or set, its dtype, and whom it serves.

    `codec`: only for fields of tiles, and only needed by formats whose slots may move. `metadata`:
    scales, zero points, ids: what is no code of a key or value itself.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Part
    codec: Codec | None = None
    metadata: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a format stores for given widths.

    Attributes:
        slot: fields of every slot. tile: fields of every tile of 32 slots.
        sets: families of sets, each with its fields; a tile refers to one set of each family, or to
            none (-1).
        per_tile: families of which a tile shares its set with no other. A page that is sealed has
            at most one set of any other family.
    """

    slot: dict[str, Field] = field(default_factory=dict)
    tile: dict[str, Field] = field(default_factory=dict)
    sets: dict[str, dict[str, Field]] = field(default_factory=dict)
    per_tile: frozenset[str] = frozenset()

    def most_sets(self, family: str) -> int:
        """How many sets of a family a page may have."""
        return TILES if family in self.per_tile else 1

    def page_nbytes(self, scattered: bool = False) -> int:
        """Bytes of one page with all the sets that it may have to itself (set ids included).

        `scattered`: its tiles come from different pages, as after eviction, and share no sets.
        """
        slots = PAGE * sum(f.nbytes for f in self.slot.values())
        tiles = TILES * sum(f.nbytes for f in self.tile.values())
        sets = sum(
            (TILES if scattered else self.most_sets(family)) * f.nbytes
            for family, fields in self.sets.items()
            for f in fields.values()
        )
        return slots + tiles + sets + len(self.sets) * TILES * torch.int32.itemsize

    def bits(self, part: Part, width: int) -> float:
        """Bits per element of keys or values, where a page has all the sets that it may have."""
        slots = sum(f.nbytes for f in self.slot.values() if f.part == part)
        tiles = sum(f.nbytes for f in self.tile.values() if f.part == part)
        sets = sum(
            self.most_sets(family) * f.nbytes
            for family, fields in self.sets.items()
            for f in fields.values()
            if f.part == part
        )
        return 8 * (slots + tiles / TILE + sets / PAGE) / width


@dataclass(frozen=True)
class Place:
    """The layer that a format serves.

    Attributes:
        layer, layers: index among the compressed layers, and their number.
        heads: KV heads; key_dim, value_dim: their widths.
        rope: the layer's rotation, if the format is `pre_rope` or needs `"rope"`.
    """

    layer: int
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    rope: RopeSpec | None = None


@dataclass
class PageBatch:
    """Pages to encode: N pages of several rows and heads, in the order of time within each.

    Attributes:
        keys: `[N, 64, D]` (pre-RoPE if the format says so), values: `[N, 64, E]`.
        row, head: host int64 `[N]`, the owner of each page; the pages of an owner are consecutive.
        rows, heads: how many there are, with or without a page in this batch.
        tables: what `PageFormat.tables` made for this layer, heads first.
    """

    keys: Tensor
    values: Tensor
    row: Tensor
    head: Tensor
    rows: int
    heads: int
    tables: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Sets:
    """Sets of one family: `[M, *field.shape]` per field, and who uses which.

    `of` is int `[N]`, the set of each page, or `[N, 2]`, one for each tile; -1: none.
    """

    fields: dict[str, Tensor]
    of: Tensor


@dataclass
class Encoded:
    """The result of `PageFormat.encode`.

    Attributes:
        slot: `[N, 64, *field.shape]`, tile: `[N, 2, *field.shape]` per field.
        sets: per family of the layout.
        statistics: what a streaming format carries to its next call, `[rows, heads, ...]` each; the
            shapes do not depend on how much was encoded, since budgets reserve room for them.
    """

    slot: dict[str, Tensor] = field(default_factory=dict)
    tile: dict[str, Tensor] = field(default_factory=dict)
    sets: dict[str, Sets] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def only(self, pages: Tensor) -> Encoded:
        """Some of the pages (host bool `[N]`) with the sets that they use, without statistics."""
        at, sets = pages.nonzero()[:, 0], {}
        for family, own in self.sets.items():
            of = own.of[at.to(own.of.device)]
            used = of[of >= 0].unique()
            fields = {name: x[used.to(x.device)] for name, x in own.fields.items()}
            sets[family] = Sets(fields, torch.where(of < 0, -1, torch.searchsorted(used, of)))
        return Encoded(
            {name: x[at.to(x.device)] for name, x in self.slot.items()},
            {name: x[at.to(x.device)] for name, x in self.tile.items()},
            sets,
        )


@dataclass
class Stored:
    """A run of S slots as it lies in pages, `[..., h]` being heads.

    Attributes:
        slot: `[..., h, S, *shape]`, tile: `[..., h, S / 32, *shape]` per field.
        sets: per family `[..., h, S / 32, *shape]` per field, the set of each tile; a family of
            which no set exists is missing.
        has: per family bool `[..., h, S / 32]`, False where a tile has no set (its entry in `sets`
            is arbitrary then).
        tables: `[h, ...]`.
        key_dim, value_dim: widths, of which packed codes may hold more.
    """

    key_dim: int
    value_dim: int
    slot: Mapping[str, Tensor] = field(default_factory=dict)
    tile: Mapping[str, Tensor] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    has: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PageFormat(Policy):
    """Base class of formats."""

    kind: ClassVar[str] = "format"

    @property
    def movable(self) -> bool:
        """Whether survivors may be compacted across pages, since no two slots share anything. If
        not, selection among sealed entries drops whole tiles of 32.
        """
        return True

    @property
    def in_place(self) -> bool:
        """Whether a page's fields are just `keys` and `values` as an exact tier holds them, so that
        a page may be filled token by token.
        """
        return False

    @property
    def pre_rope(self) -> bool:
        """Whether keys are stored before rotation (and rotated when they are read)."""
        return False

    @property
    def residual(self) -> int:
        """How many of the newest entries stay exact, beyond those that wait for a full page."""
        return 0

    @property
    def unpaged(self) -> int:
        """Up to how many entries per head stay in the exact tail for good, where entries may leave; only
        asked if `in_place`.
        """
        return 0

    @property
    def pinned(self) -> int:
        """How many first valid tokens of a row stay exact for good."""
        return 0

    @property
    def turns(self) -> bool:
        """Whether pages hold keys or values in another basis than the model's (`turn_query`,
        `turn_back`).
        """
        return False

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        """The fields for these widths. Raises ValueError if a width cannot be stored."""
        raise NotImplementedError

    def fit(self, place: Place) -> None:
        """Raise ValueError if this format cannot serve a model with such layers."""

    def tables(self, place: Place, device: torch.device) -> dict[str, Tensor]:
        """Constants of one layer, heads first `[H, ...]`: signs, levels, calibrated scales."""
        return {}

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        """Encode whole pages, once and for all; pure. What it makes of the pages of one (row, head)
        must not depend on the others in the batch.
        """
        raise NotImplementedError

    def packed(self, key_dim: int, value_dim: int) -> Parts | None:
        """How keys and values lie in memory, for kernels that read them there (None for a part: in the
        slot field `keys` or `values`, as they are). None: only `read` can tell.
        """
        return None

    def outlier_counts(self, stored: Stored) -> Tensor | None:
        """How many keys and values of each tile are stored beside its codes, `[..., h, S / 32]`; None:
        nowhere any.
        """
        return None

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys `[..., S, D]` and values `[..., S, E]` in `dtype`, in the model's basis."""
        raise NotImplementedError

    def read(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`decode` without turning back into the model's basis, as attention reads it."""
        return self.decode(stored, dtype)

    def turn_query(self, query: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Queries `[B, H, ..., D]` in the basis of the stored keys."""
        return query

    def turned_by(self, tables: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The matrix and the signs of `turn_query` as `"key"`, of `turn_back` as `"value"`: a vector times
        its signs times the matrix, and a vector times the matrix times its signs.
        """
        return {}

    def turn_back(self, out: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Attention's output `[B, H, ..., E]` over stored values, in the model's basis."""
        return out

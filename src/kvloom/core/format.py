"""`PageFormat`: how the survivors of one page are stored, and what that costs in bytes.

A page is 64 slots of one (row, KV head), as two tiles of 32 that share one set of scales. A format
names its fields, encodes whole pages once, decodes any run of slots, and owns its byte arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvloom.core.policy import TILE, Policy

PAGE = 64


@dataclass(frozen=True)
class Field:
    """One stored tensor: its shape per slot (or per scale set), its dtype, and whom it serves."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Literal["key", "value"]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a format stores for given widths: fields per slot, and fields per scale set."""

    slot: dict[str, Field]
    scale_set: dict[str, Field] = field(default_factory=dict)

    def page_nbytes(self) -> int:
        """Bytes of one page with a scale set of its own (set ids included)."""
        slots = PAGE * sum(f.nbytes for f in self.slot.values())
        sets = sum(f.nbytes for f in self.scale_set.values())
        ids = (PAGE // TILE) * torch.int32.itemsize if self.scale_set else 0
        return slots + sets + ids

    def bits(self, part: Literal["key", "value"], width: int) -> float:
        """Effective bits per stored element of keys or values, scales included."""
        slots = sum(f.nbytes for f in self.slot.values() if f.part == part)
        sets = sum(f.nbytes for f in self.scale_set.values() if f.part == part)
        return 8 * (slots + sets / PAGE) / width


@dataclass
class PageBatch:
    """Pages to encode: N pages of several rows and heads, in the order of time within each.

    Attributes:
        keys: `[N, 64, D]` (pre-RoPE if the format says so), values: `[N, 64, E]`.
        row, head: host int64 `[N]`, the owner of each page.
    """

    keys: Tensor
    values: Tensor
    row: Tensor
    head: Tensor


@dataclass
class Encoded:
    """The result of `PageFormat.encode`.

    Attributes:
        slot: `[N, 64, *field.shape]` per slot field.
        scale_set: `[M, *field.shape]` per set field.
        set_of: int32 `[N]`, the scale set of each page (pages may share one), or `[N, 2]`, one for
            each tile.
        statistics: what a streaming format carries to its next call, `[B, H, ...]` per entry.
    """

    slot: dict[str, Tensor]
    scale_set: dict[str, Tensor] = field(default_factory=dict)
    set_of: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PageFormat(Policy):
    """Base class of formats.

    Class attributes:
        movable: survivors may be compacted across pages (no two slots share a scale). If False,
            selection among sealed entries drops whole 32-slot tiles.
    """

    kind: ClassVar[str] = "format"
    movable: ClassVar[bool] = True

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

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        """The fields for these widths. Raises ValueError if a width cannot be stored."""
        raise NotImplementedError

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        """Encode whole pages, once and for all; pure."""
        raise NotImplementedError

    def decode(
        self, slot: dict[str, Tensor], scale_set: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Decode a run of S slots.

        `slot[name]` is `[..., S, *shape]`, `scale_set[name]` is `[..., S / 32, *shape]`, one set
        per tile. Returns keys `[..., S, D]` and values `[..., S, E]` in `dtype`.
        """
        raise NotImplementedError

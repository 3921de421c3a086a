"""What the live keys and values of layers take, in bits: codes, metadata, outliers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kvloom.core.format import PAGE, Field
from kvloom.core.pages import PagePool
from kvloom.core.slab import Slab
from kvloom.core.store import LayerStore
from kvloom.kernels.layout import TILE

PARTS = ("key", "value")
ID_BITS = 8 * torch.int32.itemsize


@dataclass
class Usage:
    """Sums over layers; whatever rows share counts for each of them.

    Attributes:
        keys, values: stored elements, exact ones included. seen_keys, seen_values: of all tokens.
        key_bits, value_bits: what the stored ones take. key_metadata, value_metadata: the part of it
            that is scales, zero points and ids.
        sealed: keys and values in pages. outliers: those of them beside their codes.
    """

    keys: int = 0
    values: int = 0
    seen_keys: int = 0
    seen_values: int = 0
    key_bits: float = 0.0
    value_bits: float = 0.0
    key_metadata: float = 0.0
    value_metadata: float = 0.0
    sealed: int = 0
    outliers: int = 0

    @classmethod
    def of(cls, store: LayerStore) -> Usage:
        """Of one layer; waits for the device."""
        plan, pool = store.plan, store.pool
        stored, live = int(store.stored.sum()), int(pool.live.sum())
        seen = int(store.seen.sum()) * plan.heads
        made = cls(sealed=live * (plan.key_dim + plan.value_dim))
        for part, width in zip(PARTS, (plan.key_dim, plan.value_dim), strict=True):
            made._add(f"{part}s", stored * width)
            made._add(f"seen_{part}s", seen * width)
            made._add(f"{part}_bits", (stored - live) * width * 8 * plan.dtype.itemsize)
        for slab in pool.slabs:
            made._add_slots(pool, int(slab.live.sum()))
            made._add_sets(pool, slab)
        return made

    @classmethod
    def total(cls, layers: Iterable[Usage]) -> Usage:
        """The sum over layers."""
        made = cls()
        for layer in layers:
            for f in fields(cls):
                made._add(f.name, getattr(layer, f.name))
        return made

    def figures(self) -> dict[str, Any]:
        """Means and ratios; 0 where nothing is stored."""
        return {
            "avg_key_bits": _ratio(self.key_bits, self.keys),
            "avg_value_bits": _ratio(self.value_bits, self.values),
            "avg_key_code_bits": _ratio(self.key_bits - self.key_metadata, self.keys),
            "avg_value_code_bits": _ratio(self.value_bits - self.value_metadata, self.values),
            "compression_ratio_key": _ratio(16 * self.seen_keys, self.key_bits),
            "compression_ratio_value": _ratio(16 * self.seen_values, self.value_bits),
            "outlier_ratio": _ratio(self.outliers, self.sealed),
            "total_outliers": self.outliers,
        }

    def _add(self, name: str, amount: float) -> None:
        setattr(self, name, getattr(self, name) + amount)

    def _add_field(self, f: Field, many: float) -> None:
        self._add(f"{f.part}_bits", 8 * f.nbytes * many)
        if f.metadata:
            self._add(f"{f.part}_metadata", 8 * f.nbytes * many)

    def _add_slots(self, pool: PagePool, live: int) -> None:
        for f in pool.layout.slot.values():
            self._add_field(f, live)
        for f in pool.layout.tile.values():
            self._add_field(f, live / TILE)

    def _add_sets(self, pool: PagePool, slab: Slab) -> None:
        """Sets that live tiles refer to, their ids, and outliers."""
        alive = slab.valid().unflatten(2, (-1, TILE)).any(-1)
        for segment in slab.segments():
            tiles = alive[segment.rows, segment.heads, : segment.pages * PAGE // TILE]
            for family, ids in segment.index.items():
                self._add_family(pool.layout.sets[family], ids.masked_fill(~tiles, -1), tiles)
            counts = pool.format.outlier_counts(pool.stored(segment, slab))
            self.outliers += 0 if counts is None else int((counts * tiles).sum())

    def _add_family(self, described: dict[str, Field], ids: Tensor, tiles: Tensor) -> None:
        used = sum(int((row.unique() >= 0).sum()) for row in ids)
        for f in described.values():
            self._add_field(f, used)
        parts = sorted({f.part for f in described.values()})
        for part in parts:  # an id that serves both is half of each
            for name in (f"{part}_bits", f"{part}_metadata"):
                self._add(name, ID_BITS * int(tiles.sum()) / len(parts))


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0

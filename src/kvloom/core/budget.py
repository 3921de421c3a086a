"""Budgets: one quantity, bytes, in three spellings, and what a recipe's entries cost.

`"512MiB"` is a ceiling for the whole cache, `"1024tok"` a number of entries per KV head per layer,
`"25%"` a share of what a 16-bit dense cache would hold for the tokens seen so far. All three are
kept as a ceiling in bytes after every commit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.block import GRANULE
from kvloom.core.format import PAGE

_UNITS = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%|tok|[KMG]i?B|B)\s*")
DENSE_BYTES = 2  # per element: ratios are against a 16-bit dense cache, whatever the model's dtype


@dataclass(frozen=True)
class Budget:
    """A parsed budget: `kind` is `"bytes"`, `"tokens"` or `"share"` (then `amount` is in 0..1)."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """Read `"512MiB"`, `"1024tok"`, `"25%"`, or a plain int of bytes. Raises ValueError."""
        if isinstance(text, Budget):
            return text
        if isinstance(text, int) and not isinstance(text, bool) and text > 0:
            return cls("bytes", text)
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"budget {text!r}: write '512MiB', '1024tok' or '25%'")
        number, unit = float(match[1]), match[2]
        if number <= 0 or (unit == "%" and number > 100):
            raise ValueError(f"budget {text!r}: must be above 0, and a percentage at most 100%")
        if unit == "%":
            return cls("share", number / 100)
        if unit == "tok":
            if number != int(number):
                raise ValueError(f"budget {text!r}: entries come in whole numbers")
            return cls("tokens", int(number))
        return cls("bytes", int(number * _UNITS[unit]))

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.amount * 100:g}%"
        return f"{int(self.amount)}{'tok' if self.kind == 'tokens' else 'B'}"


@dataclass(frozen=True)
class CellCost:
    """What the entries of one (row, KV head) cost at most, after a commit.

    Attributes:
        sinks, centroids: exact slots reserved from the start.
        residual: newest entries that stay exact beyond the page being filled.
        exact_slot: bytes of an exact slot. centroid_slot: bytes of a centroid.
        page: bytes of one sealed page with its per-slot metadata.
        overhead: bytes of host counters and page tables.
        dense_slot: bytes of a token in a 16-bit dense cache.
    """

    sinks: int
    centroids: int
    residual: int
    exact_slot: int
    centroid_slot: int
    page: int
    overhead: int
    dense_slot: int

    # Beyond the live pages a cell may hold: one page of dead slots and one spare page, and half a
    # page that waits until compaction pays (`LayerStore._settle`).
    SLACK_PAGES = 2.5

    @property
    def fixed(self) -> int:
        return self.sinks * self.exact_slot + self.centroids * self.centroid_slot + self.overhead

    def tail_slots(self, entries: int) -> int:
        """Capacity of the exact tail when a cell may hold `entries` evictable entries."""
        return _granules(min(entries, PAGE + self.residual))

    def nbytes(self, entries: int) -> int:
        """Upper bound of bytes when the cell holds at most `entries` (sinks included)."""
        free = max(0, entries - self.sinks)
        total = self.fixed + self.tail_slots(free) * self.exact_slot
        if free >= PAGE + self.residual:
            total += int((-(-(free - self.residual) // PAGE) + self.SLACK_PAGES) * self.page)
        return total

    def entries(self, budget: float) -> int:
        """The most entries whose bound is within `budget` bytes; 0 if not even one fits."""
        low, high = 0, 1
        while self.nbytes(self.sinks + high) <= budget and high < 1 << 40:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.nbytes(self.sinks + middle) <= budget else (low, middle)
            )
        return self.sinks + low if low else 0


def _granules(slots: int) -> int:
    return -(-slots // GRANULE) * GRANULE


def cell_shares(budget: float, shares: Tensor, rows: int) -> Tensor:
    """Split bytes over rows equally and over (layer, head) by `shares [L, H]`: fp64 `[L, H]`."""
    return budget / rows * shares / shares.sum()


def entries_for(cost: CellCost, cells: Tensor) -> Tensor:
    """`cost.entries` for each cell budget in `cells` (host), int64 of the same shape."""
    flat = [cost.entries(float(x)) for x in cells.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int64).view(cells.shape)

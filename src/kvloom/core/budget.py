"""Budgets: one quantity, bytes, in three spellings, and what a recipe's entries cost.

`"512MiB"` is a ceiling for the whole cache, `"1024tok"` a number of entries per KV head per layer
(sinks and centroids included), `"25%"` a share of what a 16-bit dense cache would hold for the tokens
seen so far. All three are kept as a ceiling in bytes after every commit.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.block import GRANULE, granules
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
            return f"{self.amount * 100:.12g}%"
        amount = int(self.amount)
        if self.kind == "tokens":
            return f"{amount}tok"
        unit = next(
            u for u in ("GiB", "MiB", "KiB", "GB", "MB", "KB", "B") if amount % _UNITS[u] == 0
        )
        return f"{amount // _UNITS[unit]}{unit}"


@dataclass(frozen=True)
class CellCost:
    """What the entries of a layer cost at most, after a commit.

    A cell is one (row, KV head). Tails and sealed pages are counted cell by cell; per-slot metadata
    of pages is rectangular, so every cell pays for the largest one's.

    Attributes:
        sinks, centroids: exact slots reserved from the start.
        residual: newest entries that stay exact beyond the page being filled.
        exact_slot: bytes of an exact slot. centroid_slot: bytes of a centroid.
        page: bytes of one sealed page. page_meta: bytes of its per-slot metadata.
        overhead: bytes of host counters and page tables.
        dense_slot: bytes of a token in a 16-bit dense cache.
        shrinks: whether a cell may come to hold less than it once sealed, as where heads pool their
            budget: then even a few entries may occupy a page.
        unpaged: up to how many entries, sinks aside, a cell needs no pages.
    """

    sinks: int
    centroids: int
    residual: int
    exact_slot: int
    centroid_slot: int
    page: int
    page_meta: int
    overhead: int
    dense_slot: int
    shrinks: bool = False
    unpaged: int = 0

    # Dead slots beyond the page that they share with live ones: compaction waits until half a page
    # per cell can be saved on average (`LayerStore.reclaim`).
    WAITING_PAGES: ClassVar[float] = 0.5
    # Metadata of pages that cells of unequal length leave unused before compaction sets in.
    IDLE_META_PAGES: ClassVar[int] = 2

    def nbytes(
        self, peaks: Tensor, largest: int | None = None, widest: int = 0, paged: bool = False
    ) -> int:
        """Upper bound of a layer's bytes when its cells hold at most `peaks` (sinks included).

        If the cells share the sum of `peaks` among them, `largest` is the most that one may hold, and
        `paged` says that they have pages even if they are few enough to need none. `widest` is the
        most of cells which share the layer's rectangular metadata with these.
        The tail fills while the pages wait and the other way round, so the worst split counts.
        """
        free = [max(0, n - self.sinks) for n in peaks.flatten().tolist()]
        reserved = (
            self.sinks * self.exact_slot + self.centroids * self.centroid_slot + self.overhead
        )
        if self.shrinks and not paged and bool(self.unpaged_cells(peaks).all()):
            return int(len(free) * reserved + sum(self._exact_nbytes(n) for n in free))
        if largest is not None:
            shared = self._shared_nbytes(sum(free), largest - self.sinks, len(free))
            return int(len(free) * reserved + shared)
        cells = {n: self._cell_nbytes(n) for n in set(free)}
        most = max((self._pages(n) for n in (*cells, widest) if self._paged(n)), default=0.0)
        wide = most + self.IDLE_META_PAGES if most else 0.0
        total = sum(cells[n] for n in free) + len(free) * (reserved + wide * self.page_meta)
        return int(total)

    def unpaged_cells(self, peaks: Tensor) -> Tensor:
        """Which cells need no pages at these `peaks [..., H]`: bool of the same shape.

        Heads that share their budget are judged together, since any of them may hold most of it.
        """
        free = peaks - self.sinks
        if self.shrinks:
            free = free.sum(-1, keepdim=True).expand_as(free) // free.shape[-1]
        return free <= self.unpaged

    def _paged(self, n: int) -> bool:
        return self.shrinks or n > self.unpaged

    def _exact_nbytes(self, n: int) -> int:
        return granules(n) * self.exact_slot

    def _cell_nbytes(self, n: int) -> int:
        """Tail and pages of a cell of `n` entries, where they split worst."""
        if not self._paged(n):
            return self._exact_nbytes(n)
        full = PAGE + self.residual
        # the least that makes a tail reserve its granule leaves the most for pages
        tails = [0, *(t for t in range(1, full + 1, GRANULE) if t <= n)]
        worst = max(self._split_nbytes(n, t) for t in tails)
        return math.ceil(worst)

    def _split_nbytes(self, n: int, tail: int) -> float:
        if n < PAGE + self.residual and not self.shrinks:  # too few to fill a page
            return self._exact_nbytes(n)
        return granules(tail) * self.exact_slot + self._pages(n - tail) * self.page

    def _pages(self, n: int) -> float:
        """Pages of `n` sealed entries, and dead ones that wait for compaction."""
        return -(-n // PAGE) + self.WAITING_PAGES if n else 0.0

    def _shared_nbytes(self, total: int, largest: int, cells: int) -> float:
        """Bytes of tails and pages when `cells` share `total` entries as they like."""
        tail = granules(PAGE + self.residual)
        pages = -(-total // PAGE) + cells * (1 + self.WAITING_PAGES)
        widest = -(-largest // PAGE) + self.WAITING_PAGES + self.IDLE_META_PAGES
        each = tail * self.exact_slot + widest * self.page_meta
        return cells * each + pages * self.page

    def entries(self, budget: float) -> int:
        """The most entries of one cell within `budget` bytes; 0 if not even one fits."""

        def fits(n: int) -> bool:
            return self.nbytes(torch.tensor([self.sinks + n])) <= budget

        low, high = 0, 1
        while fits(high) and high < 1 << 40:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return self.sinks + low if low else 0

    def solve(self, cells: Tensor) -> Tensor:
        """The most entries of cells with these byte budgets (host fp64 `[H]`), together in budget."""
        limit, scale = float(cells.sum()), 1.0
        while True:
            solved = {b: self.entries(b * scale) for b in set(cells.tolist())}
            peaks = torch.tensor([solved[b] for b in cells.tolist()], dtype=torch.int64)
            if self.nbytes(peaks) <= limit or int(peaks.max()) <= self.sinks + 1:
                return peaks
            scale *= 0.97

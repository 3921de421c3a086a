"""A slab: one allocation of pages, and the table of who owns which.

Storage may be shared after a beam reorder (rows point at the same pages); what differs between rows
(which slots live, positions, slot state) is kept per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvloom.core.block import ranges, uniform
from kvloom.core.format import PAGE, TILES
from kvloom.kernels.layout import TILE


@dataclass(frozen=True)
class Segment:
    """A run of pages that one call can read: rows, heads and pages of one slab, as views."""

    rows: slice
    heads: slice
    pages: int
    slot: dict[str, Tensor]
    tile: dict[str, Tensor]
    index: dict[str, Tensor]

    def after(self, tiles: int) -> Segment:
        """The run without its first `tiles` tiles."""
        return self.tiles(tiles, self.pages * TILES)

    def tiles(self, start: int, stop: int) -> Segment:
        """The tiles `start .. stop` of the run."""
        return replace(
            self,
            slot={name: x[:, :, start * TILE : stop * TILE] for name, x in self.slot.items()},
            tile={name: x[:, :, start:stop] for name, x in self.tile.items()},
            index={name: x[:, :, start:stop] for name, x in self.index.items()},
        )

    def covers(self, rows: int, heads: int) -> bool:
        """Whether this run is all there is."""
        return self.rows == slice(0, rows) and self.heads == slice(0, heads)


@dataclass(eq=False)
class Slab:
    """One allocation of pages.

    Attributes:
        slot: `[N, 64, ...]` per field of slots; tile: `[N, 2, ...]` per field of tiles.
        sets: per family of sets, `[M, ...]` per field; n_sets: how many of each are in use.
        index: int32 `[N, 2]` per family, the set of each tile, or -1.
        first, room, used, live: host int64 `[B, H]`: first page, pages reserved, pages in use, and
            live slots of each (row, head).
        skip: host int64 `[B, H]`, how many of the oldest slots are dead.
        alive: bool `[B, H, P * 64]`, or None while every slot in use behind `skip` is live.
        meta: `[B, H, P * 64]` per-slot tensors; P is the largest room.
        base: int32 `[B, H, P]`, position of each page's first slot, if that tells all the others.
        shared: rows were reordered by reference; nothing may be appended any more.
        version: counts how often one of these tensors was replaced by another, which kernels that know
            its address must be told. moves: counts changes of `skip` in place.
    """

    slot: dict[str, Tensor]
    tile: dict[str, Tensor]
    sets: dict[str, dict[str, Tensor]]
    index: dict[str, Tensor]
    n_sets: dict[str, int]
    first: Tensor
    room: Tensor
    used: Tensor
    live: Tensor
    skip: Tensor
    alive: Tensor | None = None
    meta: dict[str, Tensor] = field(default_factory=dict)
    base: Tensor | None = None
    shared: bool = False
    version: int = 0
    moves: int = 0
    _pages: int | None = None
    _segments: list[Segment] | None = None
    _open: Segment | None = None

    @property
    def pages(self) -> int:
        """The largest number of pages in use by a (row, head)."""
        if self._pages is None:
            self._pages = int(self.used.max()) if self.used.numel() else 0
        return self._pages

    @property
    def device(self) -> torch.device:
        return next(self._fields()).device

    @property
    def size(self) -> int:
        """Pages allocated."""
        return next(self._fields()).shape[0]

    def _fields(self) -> Iterator[Tensor]:
        yield from self.slot.values()
        yield from self.tile.values()

    def set_room(self, family: str) -> int:
        """How many more sets of a family this slab can take."""
        allocated = next(iter(self.sets[family].values())).shape[0]
        return allocated - self.n_sets[family]

    def make_set_room(self, family: str, n: int) -> None:
        """Let this slab take `n` more sets of a family; copies those that it has."""
        used = self.n_sets[family]
        for name, x in self.sets[family].items():
            self.sets[family][name] = torch.cat([x[:used], x.new_zeros(n, *x.shape[1:])])
        self.changed()

    def codes(self) -> list[Tensor]:
        """What holds keys and values: codes, scales, and which scales belong to which tile."""
        sets = [x for family in self.sets.values() for x in family.values()]
        return [*self._fields(), *sets, *self.index.values()]

    def books(self) -> list[Tensor]:
        """Live flags, metadata and page tables."""
        extra = [t for t in (self.alive, self.base) if t is not None]
        host = [self.first, self.room, self.used, self.live, self.skip]
        return [*self.meta.values(), *extra, *host]

    def valid(self) -> Tensor:
        """Live slots: bool `[B, H, pages * 64]`."""
        n = self.pages * PAGE
        if self.alive is not None:
            return self.alive[:, :, :n]
        slot = torch.arange(n, device=self.device)
        live = slot < (self.used * PAGE).to(self.device)[..., None]
        if bool(self.skip.any()):
            live &= slot >= self.skip.to(self.device)[..., None]
        return live

    @property
    def holes(self) -> bool:
        """Whether some slot in use is dead."""
        return self.alive is not None or bool(self.skip.any())

    def skipped(self, segment: Segment) -> int | None:
        """The common value of `skip` in a run, or None if it differs or must be masked instead."""
        if self.alive is not None:
            return None
        return uniform(self.skip[segment.rows, segment.heads])

    def positions(self) -> Tensor:
        """Original positions, int32 `[B, H, pages * 64]`."""
        n = self.pages
        if self.base is None:
            return self.meta["positions"][:, :, : n * PAGE]
        step = torch.arange(PAGE, dtype=torch.int32, device=self.device)
        return (self.base[:, :, :n, None] + step).flatten(2)

    def spell_out_positions(self) -> None:
        """Store every slot's position, because a page's first one no longer tells the others."""
        full = torch.zeros(
            *self.first.shape, int(self.room.max()) * PAGE, dtype=torch.int32, device=self.device
        )
        full[:, :, : self.pages * PAGE] = self.positions()
        self.meta, self.base = {**self.meta, "positions": full}, None
        self.changed()

    def bury(self, alive: Tensor) -> None:
        """Only `alive` (bool `[B, H, pages * 64]`) of the slots are live from now on."""
        if self.alive is None:
            slots = int(self.room.max()) * PAGE
            self.alive = alive.new_zeros(*alive.shape[:2], slots)
            self.changed()
        self.alive[:, :, : alive.shape[2]] = alive

    def pass_over(self, n: Tensor) -> None:
        """The oldest `n [B, H]` (host) live slots are dead from now on; the device is not waited for."""
        if self.alive is None:
            self.skip += n
            self.moves += 1
        else:
            older = self.valid().cumsum(-1)
            self.alive[:, :, : older.shape[2]] &= older > n.to(self.device)[..., None]
        self.live = self.live - n

    def changed(self) -> None:
        """A tensor is another one, or other pages are in use."""
        self.version += 1
        self._segments = self._open = self._pages = None

    def with_next_page(self) -> Segment | None:
        """One run of the pages in use and the next free one of every (row, head), if there is such."""
        if self._open is None and not self.shared and bool((self.room > self.used).all()):
            grid = self._regular(self.first, self.used + 1)
            if grid is not None:
                B, H = self.first.shape
                self._open = self._segment(slice(0, B), slice(0, H), *grid)
        return self._open

    def segments(self) -> list[Segment]:
        """The slab as runs that one call can read: all of it if regular, else rows, else heads."""
        if self._segments is None:
            self._segments = list(self._runs())
        return self._segments

    def _runs(self) -> Iterator[Segment]:
        B, H = self.first.shape
        whole = self._regular(self.first, self.used)
        if whole is not None:
            if whole[2]:
                yield self._segment(slice(0, B), slice(0, H), *whole)
            return
        for b in range(B):
            row = self._regular(self.first[b : b + 1], self.used[b : b + 1])
            if row is not None:
                if row[2]:
                    yield self._segment(slice(b, b + 1), slice(0, H), *row)
                continue
            for h in range(H):
                pages = int(self.used[b, h])
                if pages:
                    place = int(self.first[b, h]), pages, pages
                    yield self._segment(slice(b, b + 1), slice(h, h + 1), *place)

    @staticmethod
    def _regular(first: Tensor, used: Tensor) -> tuple[int, int, int] | None:
        """`(first page, stride, pages)` if these (rows, heads) form a regular grid of pages."""
        pages, starts = uniform(used), first.flatten().tolist()
        if pages is None:
            return None
        stride = starts[1] - starts[0] if len(starts) > 1 else pages
        expected = [starts[0] + i * stride for i in range(len(starts))]
        return (starts[0], stride, pages) if starts == expected and stride >= pages else None

    def _segment(self, rows: slice, heads: slice, start: int, stride: int, pages: int) -> Segment:
        b, h = rows.stop - rows.start, heads.stop - heads.start

        def view(x: Tensor) -> Tensor:
            # as_strided: the last (row, head) may have less room than the stride
            size = (b, h, pages, *x.shape[1:])
            step = x.stride(0)
            offset = x.storage_offset() + start * step
            grid = x.as_strided(size, (h * stride * step, stride * step, *x.stride()), offset)
            return grid.flatten(2, 3)

        fields = (
            {name: view(x) for name, x in f.items()} for f in (self.slot, self.tile, self.index)
        )
        return Segment(rows, heads, pages, *fields)

    def rows(self, index: Tensor) -> None:
        """Reorder rows by reference: rows may share pages from now on."""
        host = index.to("cpu")
        for name in ("first", "room", "used", "live", "skip"):
            setattr(self, name, getattr(self, name)[host])
        if self.alive is not None:
            self.alive = self.alive.index_select(0, index.to(self.alive.device))
        self.meta = {n: x.index_select(0, index.to(x.device)) for n, x in self.meta.items()}
        if self.base is not None:
            self.base = self.base.index_select(0, index.to(self.base.device))
        self.shared = True
        self.changed()

    def referenced(self) -> Tensor:
        """The storage pages that some row still uses, ascending (host int64)."""
        held: Tensor = ranges(self.first, self.used).unique()
        return held


def collect(slab: Slab, exactly: bool = False) -> None:
    """Release the pages that no row refers to any more: at once, or once they are half of the slab."""
    held = slab.referenced()
    total = slab.size
    if held.numel() == total or (held.numel() * 2 > total and not exactly):
        return
    where = torch.full((total + 1,), -1, dtype=torch.int64)
    where[held] = torch.arange(held.numel())
    on_device = held.to(slab.device)
    for fields in (slab.slot, slab.tile, slab.index):
        fields.update({name: x.index_select(0, on_device) for name, x in fields.items()})
    slab.first = where[slab.first].clamp_min(0)
    slab.room = slab.used.clone()
    slab.changed()

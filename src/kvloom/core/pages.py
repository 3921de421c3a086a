"""Pages: where sealed entries live. A pool is a list of slabs; a slab is one allocation.

Pages of one (row, KV head) are consecutive in a slab. Appending fills a slab's spare pages or adds
a slab, and never copies the past. Eviction marks slots dead; when whole pages could be saved, the
survivors move to one exact slab and the old ones are released, so that freed memory is free.

Storage is shared after a beam reorder (rows point at the same pages); what differs between rows
(which slots live, positions, slot state) is kept per row, and compaction un-shares by copying.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.core.block import Block, uniform
from kvloom.core.format import PAGE, Encoded, Layout, PageBatch, PageFormat
from kvloom.core.policy import TILE

GROWTH = 8  # a slab made while decoding has room for 1/8 of the pages that exist


class Segment(NamedTuple):
    """A run of pages that one call can read: rows, heads and pages of one slab, as views."""

    rows: slice
    heads: slice
    pages: int
    slot: dict[str, Tensor]
    set_of: Tensor | None

    def covers(self, rows: int, heads: int) -> bool:
        """Whether this run is all there is."""
        return self.rows == slice(0, rows) and self.heads == slice(0, heads)


@dataclass
class Slab:
    """One allocation of pages.

    Attributes:
        fields: `[N, 64, ...]` per slot field; sets: `[M, ...]` per set field.
        set_of: int32 `[N, 2]`, the scale set of each tile, if the format has sets.
        n_sets: how many sets are in use.
        first, room, used, live: host int64 `[B, H]`: first page, pages reserved, pages in use, and
            live slots of each (row, head).
        alive: bool `[B, H, P * 64]`, or None while every slot in use is live.
        meta: `[B, H, P * 64]` per-slot tensors; P is the largest room.
        base: int32 `[B, H, P]`, position of each page's first slot, if that tells all the others.
        shared: rows were reordered by reference; nothing may be appended any more.
    """

    fields: dict[str, Tensor]
    sets: dict[str, Tensor]
    set_of: Tensor | None
    n_sets: int
    first: Tensor
    room: Tensor
    used: Tensor
    live: Tensor
    alive: Tensor | None = None
    meta: dict[str, Tensor] = field(default_factory=dict)
    base: Tensor | None = None
    shared: bool = False
    _segments: list[Segment] | None = None

    @property
    def pages(self) -> int:
        """The largest number of pages in use by a (row, head)."""
        return int(self.used.max()) if self.used.numel() else 0

    @property
    def device(self) -> torch.device:
        return next(iter(self.fields.values())).device

    def tensors(self) -> list[Tensor]:
        extra = [t for t in (self.set_of, self.alive, self.base) if t is not None]
        host = [self.first, self.room, self.used, self.live]
        return [*self.fields.values(), *self.sets.values(), *self.meta.values(), *extra, *host]

    def valid(self) -> Tensor:
        """Live slots: bool `[B, H, pages * 64]`."""
        n = self.pages * PAGE
        if self.alive is not None:
            return self.alive[:, :, :n]
        slot = torch.arange(n, device=self.device)
        return slot < (self.used * PAGE).to(self.device)[..., None]

    def positions(self) -> Tensor:
        """Original positions, int32 `[B, H, pages * 64]`."""
        n = self.pages
        if self.base is None:
            return self.meta["positions"][:, :, : n * PAGE]
        step = torch.arange(PAGE, dtype=torch.int32, device=self.device)
        return (self.base[:, :, :n, None] + step).flatten(2)

    def changed(self) -> None:
        self._segments = None

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

        slot = {name: view(x) for name, x in self.fields.items()}
        return Segment(rows, heads, pages, slot, None if self.set_of is None else view(self.set_of))

    def rows(self, index: Tensor) -> None:
        """Reorder rows by reference: rows may share pages from now on."""
        host = index.to("cpu")
        for name in ("first", "room", "used", "live"):
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
        starts, counts = self.first.flatten().tolist(), self.used.flatten().tolist()
        held = {page for s, n in zip(starts, counts, strict=True) for page in range(s, s + n)}
        return torch.tensor(sorted(held), dtype=torch.int64)


class PagePool:
    """The sealed entries of one layer, in one format."""

    def __init__(
        self,
        fmt: PageFormat,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        heads: int,
        meta: dict[str, torch.dtype],
        base_positions: bool = False,
    ):
        self.format, self.layout, self.dtype, self.device = fmt, layout, dtype, device
        self.meta, self.base_positions = meta, base_positions
        self.slabs: list[Slab] = []
        self.pages = torch.zeros(rows, heads, dtype=torch.int64)
        self.live = torch.zeros_like(self.pages)
        self.statistics: dict[str, Tensor] = {}

    # -- reading ---------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        out = [t for slab in self.slabs for t in slab.tensors()]
        return [*out, self.pages, self.live, *self.statistics.values()]

    def decode(self, segment: Segment, slab: Slab) -> tuple[Tensor, Tensor]:
        """Keys `[b, h, S, D]` and values `[b, h, S, E]` of a segment, in the model's dtype."""
        ids = segment.set_of
        sets = {} if ids is None else {name: x[ids.long()] for name, x in slab.sets.items()}
        return self.format.decode(segment.slot, sets, self.dtype)

    def offset(self, slab: Slab) -> int:
        """How many slots lie in the slabs before this one."""
        return sum(s.pages * PAGE for s in self.slabs[: self.slabs.index(slab)])

    def decode_all(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all slabs side by side, `[B, H, S, D]`, dead slots included."""
        if not self.slabs:
            return None
        parts = [self._decode_slab(slab) for slab in self.slabs]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def _decode_slab(self, slab: Slab) -> tuple[Tensor, Tensor]:
        segments = slab.segments()
        if len(segments) == 1 and segments[0].covers(*slab.first.shape):
            return self.decode(segments[0], slab)
        keys = values = None
        for segment in segments:
            k, v = self.decode(segment, slab)
            if keys is None or values is None:
                shape = (*slab.first.shape, slab.pages * PAGE)
                keys, values = k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3])
            keys[segment.rows, segment.heads, : k.shape[2]] = k
            values[segment.rows, segment.heads, : v.shape[2]] = v
        assert keys is not None and values is not None
        return keys, values

    # -- appending -------------------------------------------------------------------------------

    def seal(self, block: Block, pages: Tensor, limit: Tensor | None = None) -> None:
        """Encode the first `pages * 64` entries of each (row, head) of `block` and store them.

        `limit` (host `[B, H]`) caps the pages that a growing slab reserves, as a budget does.
        """
        if not bool((pages > 0).any()):
            return
        batch = self._batch(block, pages)
        encoded = self.format.encode(batch, self.statistics)
        self.statistics = encoded.statistics or self.statistics
        slab = self._slab_with_room(pages, limit, encoded)
        index = self._page_index(slab, pages)
        for name, x in slab.fields.items():
            x[index] = encoded.slot[name]
        self._store_sets(slab, encoded, index)
        self._store_meta(slab, block, pages)
        slab.used = slab.used + pages
        slab.live = slab.live + pages * PAGE
        self.pages = self.pages + pages
        self.live = self.live + pages * PAGE
        slab.changed()

    def _batch(self, block: Block, pages: Tensor) -> PageBatch:
        B, H = pages.shape
        owner = torch.arange(B * H).repeat_interleave(pages.flatten())
        n = uniform(pages)
        if n is not None:
            keys, values = block.keys[:, :, : n * PAGE], block.values[:, :, : n * PAGE]
            keys, values = (
                keys.reshape(-1, PAGE, keys.shape[3]),
                values.reshape(-1, PAGE, values.shape[3]),
            )
        else:
            cells = [(b, h, int(pages[b, h]) * PAGE) for b in range(B) for h in range(H)]
            keys = torch.cat([block.keys[b, h, :m] for b, h, m in cells])
            values = torch.cat([block.values[b, h, :m] for b, h, m in cells])
            keys, values = (
                keys.view(-1, PAGE, keys.shape[1]),
                values.view(-1, PAGE, values.shape[1]),
            )
        return PageBatch(keys, values, owner // H, owner % H)

    def _slab_with_room(self, pages: Tensor, limit: Tensor | None, encoded: Encoded) -> Slab:
        n_sets = next(iter(encoded.scale_set.values())).shape[0] if encoded.scale_set else 0
        if self.slabs:
            last = self.slabs[-1]
            free = last.room - last.used
            set_room = next((x.shape[0] for x in last.sets.values()), 0) - last.n_sets
            if not last.shared and bool((free >= pages).all()) and set_room >= n_sets:
                return last
        spare = torch.zeros_like(pages)
        if self.slabs and not any(slab.shared for slab in self.slabs):
            spare = self.pages // GROWTH
            if limit is not None:  # a budget says where growth ends: double towards it
                spare = torch.minimum(self.pages, (limit - self.pages - pages).clamp_min(0))
        extra_sets = int(spare.sum()) if encoded.scale_set else 0
        slab = self.new_slab(pages + spare, n_sets + extra_sets)
        self.slabs.append(slab)
        return slab

    def new_slab(self, room: Tensor, n_sets: int) -> Slab:
        """An empty slab with `room` pages for each (row, head)."""
        total, device = int(room.sum()), self.device
        fields = {
            name: torch.zeros(total, PAGE, *f.shape, dtype=f.dtype, device=device)
            for name, f in self.layout.slot.items()
        }
        sets = {
            name: torch.zeros(n_sets, *f.shape, dtype=f.dtype, device=device)
            for name, f in self.layout.scale_set.items()
        }
        tiles = (total, PAGE // TILE)
        set_of = torch.zeros(tiles, dtype=torch.int32, device=device) if sets else None
        ends = room.flatten().cumsum(0)
        zero, slots = torch.zeros_like(room), int(room.max()) * PAGE
        per_slot = {
            name: torch.zeros(*room.shape, slots, dtype=dtype, device=device)
            for name, dtype in self.meta.items()
        }
        base = None
        if self.base_positions:
            base = torch.zeros(*room.shape, int(room.max()), dtype=torch.int32, device=device)
        first = (ends - room.flatten()).view_as(room)
        return Slab(
            fields, sets, set_of, 0, first, room, zero, zero.clone(), meta=per_slot, base=base
        )

    def _page_index(self, slab: Slab, pages: Tensor) -> Tensor:
        """Storage page of each new page, in the order of `_batch`."""
        start = (slab.first + slab.used).flatten().tolist()
        counts = pages.flatten().tolist()
        index = [s + i for s, n in zip(start, counts, strict=True) for i in range(n)]
        return torch.tensor(index, device=self.device)

    def _store_sets(self, slab: Slab, encoded: Encoded, index: Tensor) -> None:
        if slab.set_of is None:
            return
        assert encoded.set_of is not None
        n = next(iter(encoded.scale_set.values())).shape[0]
        for name, x in slab.sets.items():
            x[slab.n_sets : slab.n_sets + n] = encoded.scale_set[name]
        slab.set_of[index] = (encoded.set_of.to(torch.int32) + slab.n_sets)[:, None]
        slab.n_sets += n

    def _store_meta(self, slab: Slab, block: Block, pages: Tensor) -> None:
        n, at = uniform(pages), uniform(slab.used)
        spans = (
            [(slice(None), slice(None), n, at)]
            if n is not None and at is not None
            else [
                (slice(b, b + 1), slice(h, h + 1), int(pages[b, h]), int(slab.used[b, h]))
                for b in range(pages.shape[0])
                for h in range(pages.shape[1])
            ]
        )
        for rows, heads, count, start in spans:
            where = slice(start * PAGE, (start + count) * PAGE)
            for name, x in slab.meta.items():
                x[rows, heads, where] = block.meta[name][rows, heads, : count * PAGE].to(x.dtype)
            if slab.alive is not None:
                slab.alive[rows, heads, where] = True
            if slab.base is not None:
                firsts = block.meta["positions"][rows, heads, : count * PAGE : PAGE]
                slab.base[rows, heads, start : start + count] = firsts

    # -- freeing ---------------------------------------------------------------------------------

    def evict(self, keep: Tensor) -> None:
        """Mark dead what `keep` (bool `[B, H, all slots]`) leaves out; waits for the device."""
        start = 0
        for slab in self.slabs:
            n = slab.pages * PAGE
            alive = slab.valid() & keep[:, :, start : start + n]
            live = alive.sum(-1).cpu()
            if not torch.equal(live, slab.live):
                slab.alive = _padded(alive, int(slab.room.max()) * PAGE)
                slab.live = live
            start += n
        self.recount()

    def drop_newest(self, n: Tensor) -> None:
        """Forget the newest `n` (host `[B, H]`) live entries; trailing pages become free again."""
        valid = torch.cat([slab.valid() for slab in self.slabs], dim=2)
        newer = valid.flip(-1).cumsum(-1).flip(-1)
        self.evict(newer > n.to(valid.device)[..., None])
        for slab in self.slabs:
            alive = slab.valid()
            slot = torch.arange(1, alive.shape[2] + 1, device=alive.device)
            last = (alive * slot).amax(-1).cpu() if alive.shape[2] else slab.used
            slab.used = -(-last // PAGE)
            slab.changed()
        self.slabs = [slab for slab in self.slabs if slab.pages]
        self.recount()

    def rows(self, index: Tensor) -> None:
        """Select rows by reference, then drop storage that no row uses if it is most of a slab."""
        self.statistics = {n: x.index_select(0, index) for n, x in self.statistics.items()}
        for slab in self.slabs:
            slab.rows(index)
            collect(slab)
        self.recount(index.numel())

    def recount(self, rows: int | None = None) -> None:
        """Add up pages and live slots over the slabs."""
        shape = (self.pages.shape[0] if rows is None else rows, self.pages.shape[1])
        zero = torch.zeros(shape, dtype=torch.int64)
        self.pages = sum((slab.used for slab in self.slabs), start=zero)
        self.live = sum((slab.live for slab in self.slabs), start=zero.clone())

    def dead_pages(self) -> Tensor:
        """Whole pages that compaction would save, host `[B, H]`."""
        return (self.pages * PAGE - self.live) // PAGE


def _padded(alive: Tensor, slots: int) -> Tensor:
    out = alive.new_zeros(*alive.shape[:2], slots)
    out[:, :, : alive.shape[2]] = alive
    return out


def collect(slab: Slab) -> None:
    """Release the pages that no row refers to any more, once they are half of the slab."""
    held = slab.referenced()
    total = next(iter(slab.fields.values())).shape[0]
    if held.numel() * 2 > total or total == 0:
        return
    where = torch.full((total + 1,), -1, dtype=torch.int64)
    where[held] = torch.arange(held.numel())
    on_device = held.to(slab.device)
    slab.fields = {name: x.index_select(0, on_device) for name, x in slab.fields.items()}
    if slab.set_of is not None:
        slab.set_of = slab.set_of.index_select(0, on_device)
    slab.first = where[slab.first].clamp_min(0)
    slab.room = slab.used.clone()
    slab.changed()

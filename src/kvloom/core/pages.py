"""Pages: where sealed entries live. A pool is a list of slabs; a slab is one allocation.

Pages of one (row, KV head) are consecutive in a slab. Appending fills a slab's spare pages or adds
a slab, and never copies the past. Eviction marks slots dead; when whole pages could be saved, the
survivors move to one exact slab and the old ones are released, so that freed memory is free.

Storage is shared after a beam reorder (rows point at the same pages); what differs between rows
(which slots live, positions, slot state) is kept per row, and compaction un-shares by copying.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvloom.core.block import Block, from_newest, ranges, uniform
from kvloom.core.format import PAGE, TILES, Encoded, Field, PageBatch, PageFormat, Place, Stored
from kvloom.core.slab import Segment, Slab, collect
from kvloom.kernels.layout import TILE

GROWTH = 8  # a slab made while decoding has room for 1/8 of the pages that exist
SMALL = 4  # pages up to which it doubles, since every slab is one more attention call


class PagePool:
    """The sealed entries of one layer, in one format."""

    def __init__(
        self,
        fmt: PageFormat,
        place: Place,
        dtype: torch.dtype,
        device: torch.device,
        rows: int,
        meta: dict[str, torch.dtype],
        base_positions: bool = False,
        filled: bool = False,
    ):
        self.format, self.place, self.dtype, self.device = fmt, place, dtype, device
        self.layout = fmt.layout(place.key_dim, place.value_dim, dtype)
        self.tables = fmt.tables(place, device)
        if base_positions and device.type != "cpu":  # telling a gap would wait for the device
            meta, base_positions = {"positions": torch.int32, **meta}, False
        self.meta, self.base_positions, self.filled = meta, base_positions, filled
        self.slabs: list[Slab] = []
        self.pages = torch.zeros(rows, place.heads, dtype=torch.int64)
        self.live = torch.zeros_like(self.pages)
        self.stuck = torch.zeros_like(self.pages)
        self.statistics: dict[str, Tensor] = {}
        self.former: dict[str, Tensor] = {}  # statistics before the newest sealing
        self.newest = torch.zeros_like(self.pages)  # entries of each cell sealed by it

    # -- reading ---------------------------------------------------------------------------------

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """What holds keys and values, and the books about it."""
        codes = [t for slab in self.slabs for t in slab.codes()]
        books = [t for slab in self.slabs for t in slab.books()]
        formats = [*self.statistics.values(), *self.former.values(), *self.tables.values()]
        return codes, [*books, self.pages, self.live, self.stuck, self.newest, *formats]

    def stored(self, segment: Segment, slab: Slab) -> Stored:
        """A run as the format reads it; only sets are gathered, the rest are views."""
        sets, has = {}, {}
        for family, ids in segment.index.items():
            if slab.n_sets[family]:
                at = ids.clamp_min(0).long()
                sets[family] = {name: x[at] for name, x in slab.sets[family].items()}
                has[family] = ids >= 0
        tables = {name: x[segment.heads] for name, x in self.tables.items()}
        return Stored(
            self.place.key_dim, self.place.value_dim,
            segment.slot, segment.tile, sets, has, tables,
        )  # fmt: skip

    def decode(self, segment: Segment, slab: Slab) -> tuple[Tensor, Tensor]:
        """Keys `[b, h, S, D]` and values `[b, h, S, E]` of a segment, in the model's dtype."""
        return self.format.decode(self.stored(segment, slab), self.dtype)

    def read(self, segment: Segment, slab: Slab, skip: int = 0) -> tuple[Tensor, Tensor]:
        """`decode` in the basis of the pages, without the first `skip` slots."""
        run = segment.after(skip // TILE) if skip else segment
        keys, values = self.format.read(self.stored(run, slab), self.dtype)
        rest = skip % TILE
        return (keys[:, :, rest:], values[:, :, rest:]) if rest else (keys, values)

    def offset(self, slab: Slab) -> int:
        """How many slots lie in the slabs before this one."""
        return sum(s.pages * PAGE for s in self.slabs[: self.slabs.index(slab)])

    def decode_all(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all slabs side by side, `[B, H, S, D]`, dead slots included."""
        # one is empty until its first page is full
        slabs = [slab for slab in self.slabs if slab.pages]
        if not slabs:
            return None
        parts = [self.decode_tiles(slab, 0, slab.pages * TILES) for slab in slabs]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def decode_tiles(self, slab: Slab, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tiles `start .. stop` of every (row, head): `[B, H, tiles * 32, D]`."""
        segments = slab.segments()
        if len(segments) == 1 and segments[0].covers(*slab.first.shape):
            return self.decode(segments[0].tiles(start, stop), slab)
        keys = values = None
        for segment in segments:
            if segment.pages * TILES <= start:
                continue
            k, v = self.decode(segment.tiles(start, min(stop, segment.pages * TILES)), slab)
            if keys is None or values is None:
                shape = (*slab.first.shape, (stop - start) * TILE)
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
        encoded = self.format.encode(self._batch(block, pages), self.statistics)
        if encoded.statistics:
            self.former, self.statistics = self.statistics, encoded.statistics
            self.newest = pages * PAGE
        self._store(block, pages, encoded, limit)

    def _store(self, block: Block, pages: Tensor, encoded: Encoded, limit: Tensor | None) -> None:
        fits = self._free(limit, pages)
        if fits is not None:  # a budget counts reserved pages: fill them before making new ones
            rank = ranges(torch.zeros_like(pages), pages)
            first = rank < fits.flatten().repeat_interleave(pages.flatten())
            self._store(block, fits, encoded.only(first), limit)
            rest = block.span(fits * PAGE, block.count - fits * PAGE)
            self._store(rest, pages - fits, encoded.only(~first), limit)
            return
        slab = self._slab_with_room(pages, limit, encoded)
        index = self._page_index(slab, pages)
        for name, x in slab.slot.items():
            x[index] = encoded.slot[name]
        for name, x in slab.tile.items():
            x[index] = encoded.tile[name]
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
        else:
            at = _cells(torch.zeros_like(pages), pages * PAGE, self.device)
            keys, values = block.keys[at], block.values[at]
        keys = keys.reshape(-1, PAGE, keys.shape[-1])
        values = values.reshape(-1, PAGE, values.shape[-1])
        return PageBatch(keys, values, owner // H, owner % H, B, H, self.tables)

    def _free(self, limit: Tensor | None, pages: Tensor) -> Tensor | None:
        """What the last slab can take of `pages`, if that is a part of them and a budget binds."""
        if limit is None or not self.slabs or self.slabs[-1].shared:
            return None
        fits = torch.minimum(self.slabs[-1].room - self.slabs[-1].used, pages)
        partly = bool((fits > 0).any()) and bool((fits < pages).any())
        return fits if partly else None

    def _slab_with_room(self, pages: Tensor, limit: Tensor | None, encoded: Encoded) -> Slab:
        n_sets = {family: _length(sets.fields) for family, sets in encoded.sets.items()}
        if self.slabs:
            last = self.slabs[-1]
            if bool((last.room - last.used >= pages).all()) and not last.shared:
                return last
        spare = torch.zeros_like(pages)
        if not any(slab.shared for slab in self.slabs):
            spare = self._growth()
            if limit is not None:  # a budget says where growth ends: double towards it
                spare = torch.minimum(self.pages, (limit - self.pages - pages).clamp_min(0))
            if self.filled:  # the next pages are filled in place, and read in one run with these
                spare = torch.maximum(spare, pages // (2 * GROWTH)).clamp_min(1)
        extra, new = int(spare.sum()), int(pages.sum())
        for family, n in n_sets.items():  # spare pages get sets at the rate of these
            n_sets[family] = n + -(-n * extra // new)
        slab = self.new_slab(pages + spare, n_sets)
        self.slabs.append(slab)
        return slab

    def new_slab(self, room: Tensor, n_sets: dict[str, int]) -> Slab:
        """An empty slab with `room` pages for each (row, head), and `n_sets` sets of each family."""
        total, device, layout = int(room.sum()), self.device, self.layout

        def fields(of: dict[str, Field], *n: int) -> dict[str, Tensor]:
            return {
                k: torch.zeros(*n, *f.shape, dtype=f.dtype, device=device) for k, f in of.items()
            }

        slot, tile = fields(layout.slot, total, PAGE), fields(layout.tile, total, TILES)
        sets = {name: fields(of, n_sets.get(name, 0)) for name, of in layout.sets.items()}
        index = {
            name: torch.full((total, TILES), -1, dtype=torch.int32, device=device)
            for name in layout.sets
        }
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
            slot, tile, sets, index, dict.fromkeys(sets, 0), first, room, zero, zero.clone(), zero.clone(),
            meta=per_slot, base=base,
        )  # fmt: skip

    def _growth(self) -> Tensor:
        """Spare pages for a slab that comes after others."""
        return torch.maximum(self.pages // GROWTH, self.pages.clamp_max(SMALL))

    def grow_page(self) -> Slab | None:
        """A slab with a page that the tail may fill in place (`Slab.with_next_page`): the last one, or
        a new one once that is used up. None if pages are shared or do not form a regular grid.
        """
        if not self.slabs or any(slab.shared for slab in self.slabs):
            return None
        if not bool((self.slabs[-1].room > self.slabs[-1].used).any()):
            self.slabs.append(self.new_slab(self._growth().clamp_min(1), {}))
        return None if self.slabs[-1].with_next_page() is None else self.slabs[-1]

    def close_page(self) -> None:
        """The page that the tail filled is sealed where it is."""
        slab = self.slabs[-1]
        slab.used, slab.live = slab.used + 1, slab.live + PAGE
        if slab.alive is not None:
            where = (slab.used - 1) * PAGE
            slot = torch.arange(slab.alive.shape[2]) - where[..., None]
            slab.alive |= ((slot >= 0) & (slot < PAGE)).to(slab.device)
        slab.changed()
        self.recount()

    def _page_index(self, slab: Slab, pages: Tensor) -> Tensor:
        """Storage page of each new page, in the order of `_batch`."""
        return ranges(slab.first + slab.used, pages).to(self.device)

    def _store_sets(self, slab: Slab, encoded: Encoded, index: Tensor) -> None:
        for family, sets in encoded.sets.items():
            start, n = slab.n_sets[family], _length(sets.fields)
            if n > slab.set_room(family):  # the slab's first pages shared more sets than these
                most = slab.size * self.layout.most_sets(family)
                slab.make_set_room(family, max(n, min(start // GROWTH, most - start)))
            for name, x in slab.sets[family].items():
                x[start : start + n] = sets.fields[name]
            ids = torch.where(sets.of < 0, -1, sets.of + start).to(torch.int32)
            slab.index[family][index] = ids if ids.ndim == 2 else ids[:, None]
            slab.n_sets[family] += n

    def _store_meta(self, slab: Slab, block: Block, pages: Tensor) -> None:
        if slab.base is not None and not _consecutive(block, pages):
            slab.spell_out_positions()
        even = uniform(pages) is not None and uniform(slab.used) is not None
        places = _runs if even else partial(_cells, device=self.device)
        none = torch.zeros_like(pages)
        source, target = places(none, pages * PAGE), places(slab.used * PAGE, pages * PAGE)
        for name, x in slab.meta.items():
            x[target] = block.meta[name][source].to(x.dtype)
        if slab.alive is not None:
            slab.alive[target] = True
        if slab.base is not None:
            firsts = block.meta["positions"][:, :, ::PAGE]
            slab.base[places(slab.used, pages)] = firsts[places(none, pages)].to(slab.base.dtype)

    # -- freeing ---------------------------------------------------------------------------------

    def evict(self, keep: Tensor) -> None:
        """Mark dead what `keep` (bool `[B, H, all slots]`) leaves out; waits for the device."""
        start = 0
        for slab in self.slabs:
            n = slab.pages * PAGE
            alive = slab.valid() & keep[:, :, start : start + n]
            live = alive.sum(-1).cpu()
            if not torch.equal(live, slab.live):
                slab.bury(alive)
                slab.live = live
            start += n
        self.recount()

    def drop_oldest(self, n: Tensor) -> None:
        """Forget the oldest `n` (host `[B, H]`) live entries; the device is not waited for."""
        left = n
        for slab in self.slabs:
            mine = torch.minimum(left, slab.live)
            slab.pass_over(mine)
            left = left - mine
        self.live = self.live - (n - left)

    def can_drop(self, n: Tensor) -> bool:
        """Whether the statistics can follow if the newest `n` (host `[B, H]`) live entries are forgotten:
        in each cell none, or exactly what was sealed last.
        """
        return not self.statistics or bool(((n == 0) | (n == self.newest)).all())

    def _statistics_before(self, n: Tensor) -> None:
        """Take back the statistics of the cells that forget the `n` entries sealed last."""
        back = (n > 0) & (n == self.newest)
        for name, x in self.statistics.items():
            former = self.former.get(name, torch.zeros_like(x))
            here = back.to(x.device).view(*back.shape, *[1] * (x.ndim - 2))
            self.statistics[name] = torch.where(here, former, x)
        self.newest = self.newest.masked_fill(back, 0)

    def drop_newest(self, n: Tensor) -> None:
        """Forget the newest `n` (host `[B, H]`) live entries (see `can_drop`); trailing pages become free
        again, and statistics are what they were.
        """
        self._statistics_before(n)
        valid = torch.cat([slab.valid() for slab in self.slabs], dim=2)
        newer = from_newest(valid)
        self.evict(newer > n.to(valid.device)[..., None])
        for slab in self.slabs:
            alive = slab.valid()
            slot = torch.arange(1, alive.shape[2] + 1, device=alive.device)
            last = (alive * slot).amax(-1).cpu() if alive.shape[2] else slab.used
            slab.used = -(-last // PAGE)
            slab.skip = torch.minimum(slab.skip, slab.used * PAGE)
            slab.changed()
        self.slabs = [slab for slab in self.slabs if slab.pages]
        self.recount()

    def rows(self, index: Tensor) -> None:
        """Select rows by reference, then drop storage that no row uses if it is most of a slab."""
        self.statistics, self.former = (
            {n: x.index_select(0, index.to(x.device)) for n, x in held.items()}
            for held in (self.statistics, self.former)
        )
        self.newest = self.newest[index.to("cpu")]
        fewer = index.numel() < self.pages.shape[0]  # rows are gone for good: keep nothing of them
        for slab in self.slabs:
            slab.rows(index)
            collect(slab, exactly=fewer)
        self.slabs = [slab for slab in self.slabs if slab.pages]
        self.stuck = self.stuck[index.to("cpu")]
        self.recount(index.numel())

    def clear(self) -> None:
        """Forget all pages."""
        self.slabs = []
        self.recount()
        self.stuck, self.newest = torch.zeros_like(self.pages), torch.zeros_like(self.pages)

    def recount(self, rows: int | None = None) -> None:
        """Add up pages and live slots over the slabs."""
        shape = (self.pages.shape[0] if rows is None else rows, self.pages.shape[1])
        zero = torch.zeros(shape, dtype=torch.int64)
        self.pages = sum((slab.used for slab in self.slabs), start=zero)
        self.live = sum((slab.live for slab in self.slabs), start=zero.clone())

    def idle_meta_pages(self) -> int:
        """Pages of per-slot metadata that no cell can use: slabs are as wide as their largest cell."""
        if len(self.slabs) < 2:
            return 0
        wide = sum(int(slab.room.max()) for slab in self.slabs)
        return wide - int(torch.stack([slab.room for slab in self.slabs]).sum(0).max())

    def reclaimable(self) -> int:
        """Whole pages that compaction would save, over all cells.

        Dead slots that the last compaction had to leave in place (a live tile's) do not count.
        """
        dead = self.pages * PAGE - self.live
        if self.stuck.shape == dead.shape:
            dead = dead - self.stuck
        return int((dead.clamp_min(0) // PAGE).sum())


def _runs(start: Tensor, count: Tensor) -> tuple[slice, ...]:
    """The slots `start .. start + count - 1` of every (row, head), the same for all."""
    first, n = uniform(start), uniform(count)
    assert first is not None and n is not None
    return slice(None), slice(None), slice(first, first + n)


def _cells(start: Tensor, count: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """The slots `start .. start + count - 1` of every (row, head), one cell after the other, as indices."""
    owner = torch.arange(count.numel()).repeat_interleave(count.flatten())
    heads = count.shape[1]
    return tuple(x.to(device) for x in (owner // heads, owner % heads, ranges(start, count)))


def _consecutive(block: Block, pages: Tensor) -> bool:
    """Whether the positions within each of these pages go up one by one."""
    positions = block.meta["positions"][:, :, : int(pages.max()) * PAGE].unflatten(2, (-1, PAGE))
    used = torch.arange(positions.shape[2]) < pages[..., None]
    return bool((positions.diff(dim=-1) == 1).all(-1)[used].all())


def _length(fields: dict[str, Tensor]) -> int:
    return next((x.shape[0] for x in fields.values()), 0)

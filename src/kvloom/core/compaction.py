"""Compaction: freed memory is free.

Survivors move, in order, to one slab of exactly the pages they need. Movable formats move slots,
others whole tiles; nothing is encoded again. Rows that shared pages get copies of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import PAGE, Field
from kvloom.core.pages import PagePool
from kvloom.core.slab import Slab
from kvloom.kernels import ops
from kvloom.kernels.layout import TILE, Codes


def compact(pool: PagePool) -> None:
    """Rebuild the pool as one exact slab."""
    unit = 1 if pool.format.movable else TILE
    runs = [_Units.of(slab, unit) for slab in pool.slabs]
    counts = sum((run.count for run in runs), start=torch.zeros_like(pool.pages))
    used = -(-counts * unit // PAGE)
    n_sets = {family: sum(run.sets[family].numel() for run in runs) for family in pool.layout.sets}
    new = pool.new_slab(used, n_sets)
    new.used, new.live = used, pool.live
    new.alive = torch.zeros(
        *used.shape, int(used.max()) * PAGE, dtype=torch.bool, device=pool.device
    )
    done = torch.zeros_like(counts)
    moves = []
    for slab, run in zip(pool.slabs, runs, strict=True):
        moves.append(run.move(slab, new, done))
        done = done + run.count
    for name, f in pool.layout.tile.items():
        _move_tiles(f, [slab.tile[name] for slab in pool.slabs], new.tile[name], moves, unit)
    if torch.equal(new.live, new.used * PAGE):
        new.alive = None
    new.changed()
    pool.slabs = [new] if bool((used > 0).any()) else []
    pool.recount()
    pool.stuck = (pool.pages * PAGE - pool.live) // PAGE * PAGE


Move = tuple[Tensor, Tensor]  # storage units before and after


@dataclass
class _Units:
    """The live units (slots or tiles) of a slab: their (row, head, unit) and how many per cell.

    `sets`: the sets of each family that they refer to, ascending.
    """

    alive: Tensor
    count: Tensor
    unit: int
    sets: dict[str, Tensor]

    @classmethod
    def of(cls, slab: Slab, unit: int) -> _Units:
        valid = slab.valid()
        alive = valid.unflatten(2, (-1, unit)).any(-1) if valid.shape[2] else valid
        run = cls(alive, alive.sum(-1).cpu(), unit, {})
        if slab.index:
            _, _, src = run.source(slab)
            for family, index in slab.index.items():
                ids = index.flatten()[src].long().unique()
                run.sets[family] = ids[ids >= 0]
        return run

    def source(self, slab: Slab) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """`((b, h, u), rank within the cell, storage unit)` of each live unit."""
        cell = self.alive.nonzero(as_tuple=True)
        rank = (self.alive.cumsum(-1) - 1)[cell]
        first = slab.first.to(slab.device)[cell[0], cell[1]]
        return cell, rank, first * (PAGE // self.unit) + cell[2]

    def move(self, slab: Slab, new: Slab, done: Tensor) -> Move:
        """Copy the live units behind the `done` units of each cell of `new`, except for the fields
        of tiles.
        """
        (b, h, u), rank, src = self.source(slab)
        at = rank + done.to(slab.device)[b, h]
        dst = new.first.to(slab.device)[b, h] * (PAGE // self.unit) + at
        for name, x in new.slot.items():
            _units(x, self.unit)[dst] = _units(slab.slot[name], self.unit)[src]
        n = slab.pages * PAGE
        for name, x in new.meta.items():
            x.unflatten(2, (-1, self.unit))[b, h, at] = slab.meta[name][:, :, :n].unflatten(
                2, (-1, self.unit)
            )[b, h, u]
        assert new.alive is not None
        new.alive.unflatten(2, (-1, self.unit))[b, h, at] = slab.valid().unflatten(
            2, (-1, self.unit)
        )[b, h, u]
        for family, held in self.sets.items():
            ids, start = slab.index[family].flatten()[src].long(), new.n_sets[family]
            local = torch.searchsorted(held, ids) + start
            new.index[family].view(-1)[dst] = torch.where(ids < 0, -1, local).to(torch.int32)
            for name, x in new.sets[family].items():
                x[start : start + held.numel()] = slab.sets[family][name][held]
            new.n_sets[family] += held.numel()
        return src, dst


def _move_tiles(f: Field, old: list[Tensor], new: Tensor, moves: list[Move], unit: int) -> None:
    """Copy a field of tiles: tile by tile, or slot by slot through its codec."""
    tiles = new.flatten(0, 1)
    if unit == TILE:
        for x, (src, dst) in zip(old, moves, strict=True):
            tiles[dst] = x.flatten(0, 1)[src]
        return
    assert f.codec is not None, "slots of a movable format must be separable"
    if isinstance(f.codec, Codes):
        move = ops.mover(new.device, f.codec.width)
        if move is not None:
            move(old, *_origins(moves, tiles), new, f.codec)
            return
    slots = f.codec.unpack(tiles)  # of zeros: what no slot fills stays in order
    flat = slots.reshape(-1, slots.shape[2])
    for x, (src, dst) in zip(old, moves, strict=True):
        held, at = (src // TILE).unique(return_inverse=True)
        flat[dst] = f.codec.unpack(x.flatten(0, 1)[held]).reshape(-1, flat.shape[1])[
            at * TILE + src % TILE
        ]
    tiles.copy_(f.codec.pack(flat.view_as(slots)))


def _origins(moves: list[Move], tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Old slab and slot of every new slot of `tiles`, int32; slab -1: nothing moves there."""
    slabs, slots = (
        torch.full((len(tiles) * TILE,), -1, dtype=torch.int32, device=tiles.device)
        for _ in range(2)
    )
    for i, (src, dst) in enumerate(moves):
        slabs[dst], slots[dst] = i, src.to(torch.int32)
    return slabs, slots


def _units(x: Tensor, unit: int) -> Tensor:
    """`[N, 64, ...]` seen as `[N * 64 / unit, unit, ...]`."""
    return x.view(x.shape[0] * (PAGE // unit), unit, *x.shape[2:])

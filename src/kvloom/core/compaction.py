"""Compaction: freed memory is free.

Survivors move, in order, to one slab of exactly the pages they need. Movable formats move slots,
others whole tiles; nothing is encoded again. Rows that shared pages get copies of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import PAGE
from kvloom.core.pages import PagePool
from kvloom.core.policy import TILE
from kvloom.core.slab import Slab


def compact(pool: PagePool) -> None:
    """Rebuild the pool as one exact slab."""
    unit = 1 if pool.format.movable else TILE
    runs = [_Units.of(slab, unit) for slab in pool.slabs]
    counts = sum((run.count for run in runs), start=torch.zeros_like(pool.pages))
    used = -(-counts * unit // PAGE)
    new = pool.new_slab(used, sum(run.sets.numel() for run in runs))
    new.used, new.live = used, pool.live
    new.alive = torch.zeros(
        *used.shape, int(used.max()) * PAGE, dtype=torch.bool, device=pool.device
    )
    done = torch.zeros_like(counts)
    for slab, run in zip(pool.slabs, runs, strict=True):
        run.move(slab, new, done)
        done = done + run.count
    if torch.equal(new.live, new.used * PAGE):
        new.alive = None
    pool.slabs = [new] if bool((used > 0).any()) else []
    pool.recount()
    pool.stuck = (pool.pages * PAGE - pool.live) // PAGE * PAGE


@dataclass
class _Units:
    """The live units (slots or tiles) of a slab: their (row, head, unit) and how many per cell."""

    alive: Tensor
    count: Tensor
    unit: int
    sets: Tensor

    @classmethod
    def of(cls, slab: Slab, unit: int) -> _Units:
        valid = slab.valid()
        alive = valid.unflatten(2, (-1, unit)).any(-1) if valid.shape[2] else valid
        sets = torch.zeros(0, dtype=torch.int64, device=valid.device)
        run = cls(alive, alive.sum(-1).cpu(), unit, sets)
        if slab.set_of is not None:
            _, _, src = run.source(slab)
            run.sets = slab.set_of.flatten()[src].long().unique()
        return run

    def source(self, slab: Slab) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """`((b, h, u), rank within the cell, storage unit)` of each live unit."""
        cell = self.alive.nonzero(as_tuple=True)
        rank = (self.alive.cumsum(-1) - 1)[cell]
        first = slab.first.to(slab.device)[cell[0], cell[1]]
        return cell, rank, first * (PAGE // self.unit) + cell[2]

    def move(self, slab: Slab, new: Slab, done: Tensor) -> None:
        """Copy the live units behind the `done` units of each cell of `new`."""
        (b, h, u), rank, src = self.source(slab)
        at = rank + done.to(slab.device)[b, h]
        dst = new.first.to(slab.device)[b, h] * (PAGE // self.unit) + at
        for name, x in new.fields.items():
            _units(x, self.unit)[dst] = _units(slab.fields[name], self.unit)[src]
        n = slab.pages * PAGE
        for name, x in new.meta.items():
            x.unflatten(2, (-1, self.unit))[b, h, at] = slab.meta[name][:, :, :n].unflatten(
                2, (-1, self.unit)
            )[b, h, u]
        assert new.alive is not None
        new.alive.unflatten(2, (-1, self.unit))[b, h, at] = slab.valid().unflatten(
            2, (-1, self.unit)
        )[b, h, u]
        if slab.set_of is not None and new.set_of is not None:
            ids = slab.set_of.flatten()[src].long()
            local = torch.searchsorted(self.sets, ids)
            new.set_of.view(-1)[dst] = (local + new.n_sets).to(torch.int32)
            for name, x in new.sets.items():
                x[new.n_sets : new.n_sets + self.sets.numel()] = slab.sets[name][self.sets]
            new.n_sets += self.sets.numel()


def _units(x: Tensor, unit: int) -> Tensor:
    """`[N, 64, ...]` seen as `[N * 64 / unit, unit, ...]`."""
    return x.view(x.shape[0] * (PAGE // unit), unit, *x.shape[2:])

"""Cells, (row, head), that hold too little to need pages: which they are, and how they leave those they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.block import Block
from kvloom.core.compaction import compact
from kvloom.core.plan import LayerPlan
from kvloom.core.view import entries_of

if TYPE_CHECKING:
    from kvloom.core.store import LayerStore


class Unpaged:
    """Up to how many entries the cells of a layer need no pages.

    Attributes:
        most: that number, sinks aside, host int64 `[B, H]`; -1 where pages are needed.
        of: the capacity for which it was worked out. some: whether any cell needs none.
        room: of a tail that is all there is, at its longest; 0 if some cell needs pages.
    """

    def __init__(self, most: Tensor):
        self.most = most
        self.of: Tensor | None = None
        self.some = False
        self.room = 0

    def judge(self, plan: LayerPlan, capacity: Tensor) -> None:
        """Work it out, once for each `capacity [B, H]`."""
        if not plan.unpaged or self.of is capacity:
            return
        peak = plan.recipe.schedule.peak(capacity) - plan.sinks
        self.most, self.of = peak.masked_fill(~plan.unpaged_cells(capacity), -1), capacity
        exact = self.most >= 0
        self.some = bool(exact.any())
        self.room = int(self.most.max()) if bool(exact.all()) else 0

    def fits(self, plan: LayerPlan, held: Tensor) -> Tensor:
        """Which cells need no pages for the entries `held [B, H]`: one may have to wait for its schedule to
        become short enough.
        """
        most = self.most
        if plan.pools:
            held, most = (x.sum(-1, keepdim=True).expand_as(x) for x in (held, most))
        return held <= most


def unsealed(store: LayerStore, exact: Block, cells: Tensor) -> Block:
    """`cells` (host bool `[B, H]`) exact again, with `exact` last, and without pages: more rows share a
    budget in bytes than when they were sealed, and these heads need none any more.
    """
    held, pool = entries_of(store, exact), store.pool
    unknown = torch.full_like(held.valid, -1, dtype=torch.int32)  # positions that no page keeps
    meta = {name: held.meta.get(name, unknown) for name in store.plan.meta}
    slots = torch.full_like(exact.count, held.valid.shape[2])
    everything = Block(held.keys, held.values, slots, meta)
    taken = held.valid.clone()
    sealed = taken.shape[2] - exact.longest
    taken[:, :, :sealed] &= cells.to(taken.device)[..., None]
    pool.evict(~taken[:, :, :sealed])
    compact(pool)
    return everything.keep(taken)

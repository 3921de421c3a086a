"""The second half of a compression: losers go into centroids, or into the entries that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.block import Block
from kvloom.core.entries import Entries
from kvloom.core.format import PAGE
from kvloom.core.merge import CentroidMerger, Group, Losers, Merged, SurvivorMerger

if TYPE_CHECKING:
    from kvloom.core.store import LayerStore


def fold_losers(
    store: LayerStore, entries: Entries, keep: Tensor, pending: Block
) -> tuple[Block, int | None]:
    """Hand the entries that `keep` (bool `[B, H, S]`) leaves out to the recipe's merger.

    Returns the exact entries, changed where they took something in, and how many losers live on in
    others (None: all of them). Nothing is changed if the merger raises.
    """
    merger, lost = store.plan.merger, entries.valid & ~keep
    if isinstance(merger, CentroidMerger):
        assert store.centroids is not None
        losers = losers_of(entries, lost, merger)
        store.centroids, store.merger_memory = merger.ingest(
            losers, store.centroids, store.merger_memory
        )
        return pending, None
    if isinstance(merger, SurvivorMerger):
        group = _group(store, entries, keep, lost, pending.longest, merger)
        merged = merger.merge(group)
        store.merger_memory = merged.memory or store.merger_memory
        pending = _write(store, pending, merged)
        return pending, None if merged.folded is None else int(merged.folded.sum())
    return pending, 0


def losers_of(entries: Entries, lost: Tensor, merger: CentroidMerger) -> Losers:
    """The entries that `lost` (bool `[B, H, S]`) marks, side by side and in order."""
    n = int(lost.sum(-1).max())
    first = torch.argsort(~lost, dim=-1, stable=True)[..., :n]

    def take(x: Tensor) -> Tensor:
        if x.ndim == 3:
            return x.gather(2, first)
        return x.gather(2, first[..., None].expand(*first.shape, x.shape[3]))

    keys = entries.keys if merger.rotated else entries.pre_rope_keys
    none = torch.zeros(lost.shape, device=lost.device)
    mass, positions = entries.meta.get("mass", none), entries.positions
    fields = (take(x) for x in (keys, entries.values, mass, positions, lost))
    keys, values, mass, positions, valid = fields
    return Losers(keys.float(), values.float(), mass, positions, valid)


def _group(
    store: LayerStore,
    entries: Entries,
    keep: Tensor,
    lost: Tensor,
    exact: int,
    merger: SurvivorMerger,
) -> Group:
    assert entries.scores is not None
    kept = keep & entries.valid
    open_ = kept
    if not store.plan.format.in_place:
        open_ = kept.clone()
        open_[:, :, : kept.shape[2] - exact] = False
    return Group(
        entries.keys.float(), entries.values.float(), lost, kept, open_,
        {name: entries.meta[name] for name in merger.state_names},
        entries.scores,
        entries.meta.get("positions"),
        store.merger_memory,
        entries.scale, entries.softcap, entries.layer,
    )  # fmt: skip


def _write(store: LayerStore, pending: Block, merged: Merged) -> Block:
    """Put what changed where it came from: pages that can be changed, and the exact entries."""
    start, n = 0, pending.longest
    sealed = sum(slab.pages * PAGE for slab in store.pool.slabs)
    if store.plan.format.in_place:
        for slab in store.pool.slabs:
            stop = start + slab.pages * PAGE
            for segment in slab.segments():
                where = (segment.rows, segment.heads, slice(start, start + segment.pages * PAGE))
                for name, x in (("keys", merged.keys), ("values", merged.values)):
                    if x is not None:
                        segment.slot[name].copy_(x[where])
            for name, x in merged.state.items():
                slab.meta[name][:, :, : stop - start] = x[:, :, start:stop]
            start = stop
    exact = slice(sealed, sealed + n)

    def new(old: Tensor, changed: Tensor | None) -> Tensor:
        return old[:, :, :n] if changed is None else changed[:, :, exact].to(old.dtype)

    meta = {name: new(x, merged.state.get(name)) for name, x in pending.meta.items()}
    keys, values = new(pending.keys, merged.keys), new(pending.values, merged.values)
    return Block(keys, values, pending.count, meta)

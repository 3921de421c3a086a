"""The second half of a compression: losers go into centroids, or into the entries that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.block import Block, from_newest, take_slots
from kvloom.core.entries import Entries
from kvloom.core.format import PAGE
from kvloom.core.merge import CentroidMerger, Group, Losers, Merged, SurvivorMerger
from kvloom.kernels.layout import TILE

if TYPE_CHECKING:
    from kvloom.core.slab import Slab
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
        return pending, _ingest(store, merger, losers_of(store, entries, lost, pending, merger))
    if isinstance(merger, SurvivorMerger):
        group = _group(store, entries, keep, lost, pending.longest, merger)
        merged = merger.merge(group)
        store.merger_memory = merged.memory or store.merger_memory
        pending = _write(store, pending, merged)
        return pending, None if merged.folded is None else int(merged.folded.sum())
    return pending, 0


def fold_oldest(store: LayerStore, entries: Entries, pending: Block, n: Tensor) -> int | None:
    """Hand the oldest `n [B, H]` (host) entries to the recipe's centroids, as `fold_losers` does, without
    waiting for the device.
    """
    merger, valid = store.plan.merger, entries.valid
    assert isinstance(merger, CentroidMerger)
    lost = valid & (valid.cumsum(-1) <= n.to(valid.device)[..., None])
    return _ingest(store, merger, losers_of(store, entries, lost, pending, merger, n))


def _ingest(store: LayerStore, merger: CentroidMerger, losers: Losers) -> int | None:
    assert store.centroids is not None
    store.centroids, store.merger_memory = merger.ingest(
        losers, store.centroids, store.merger_memory
    )
    taken = merger.takes(losers)
    return None if taken is None else int(taken.sum())


def losers_of(
    store: LayerStore,
    entries: Entries,
    lost: Tensor,
    pending: Block,
    merger: CentroidMerger,
    oldest: Tensor | None = None,
) -> Losers:
    """The entries that `lost` (bool `[B, H, S]`) marks, side by side and in order.

    Only tiles that some loser lies in are decoded. `oldest` (host `[B, H]`) says that they are so many
    oldest ones; then the device is not waited for.
    """
    sealed, parts, columns = lost.shape[2] - pending.longest, [], []
    for slab, start, first, stop in _tiles_of(store, lost, oldest):
        at = slice(start + first * TILE, start + stop * TILE)
        keys, values = store.pool.decode_tiles(slab, first, stop)
        parts.append((_as_folded(store, merger, keys, entries.positions[:, :, at], True), values))
        columns.append(at)
    if oldest is None or bool((oldest > store.pool.live).any()):
        exact = slice(sealed, lost.shape[2])
        keys, values = (x[:, :, : pending.longest] for x in (pending.keys, pending.values))
        positions = entries.positions[:, :, exact]
        parts.append((_as_folded(store, merger, keys, positions, False), values))
        columns.append(exact)

    mask = torch.cat([lost[:, :, at] for at in columns], 2)
    most = int((mask.sum(-1) if oldest is None else oldest).max())
    order = torch.argsort(~mask, dim=-1, stable=True)[..., :most]

    def meta(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, at] for at in columns], 2).gather(2, order)

    none = torch.zeros(lost.shape, device=lost.device)
    keys, values = (take_slots(torch.cat([p[i].float() for p in parts], 2), order) for i in (0, 1))
    return Losers(
        keys, values, meta(entries.meta.get("mass", none)), meta(entries.positions), meta(lost)
    )


def _tiles_of(
    store: LayerStore, lost: Tensor, oldest: Tensor | None
) -> Iterator[tuple[Slab, int, int, int]]:
    """Slabs with losers, how many slots lie before each, and the range of tiles with losers."""
    start = 0
    for slab in store.pool.slabs:
        n = slab.pages * PAGE
        if oldest is not None and slab.alive is None:
            mine = torch.minimum(oldest, slab.live)
            oldest, some = oldest - mine, mine > 0
            if bool(some.any()):
                first, last = slab.skip[some], (slab.skip + mine)[some]
                yield slab, start, int(first.min()) // TILE, -(-int(last.max()) // TILE)
        else:
            here = lost[:, :, start : start + n].any(0).any(0).unflatten(0, (-1, TILE)).any(-1)
            tiles = here.nonzero().flatten().tolist()
            oldest = None if oldest is None else oldest - torch.minimum(oldest, slab.live)
            if tiles:
                yield slab, start, tiles[0], tiles[-1] + 1
        start += n


def _as_folded(
    store: LayerStore, merger: CentroidMerger, keys: Tensor, positions: Tensor, paged: bool
) -> Tensor:
    """Keys in the basis that the merger wants: rotated, or as before rotation."""
    pre = paged and store.plan.pre_rope
    if pre == (not merger.rotated):
        return keys
    rope = store.plan.rope
    assert rope is not None
    if merger.rotated:
        return store.rotate(keys, positions)
    return rope.unrotate(keys, positions)


def _group(
    store: LayerStore,
    entries: Entries,
    keep: Tensor,
    lost: Tensor,
    exact: int,
    merger: SurvivorMerger,
) -> Group:
    scorer = store.plan.recipe.scorer
    assert entries.scores is not None and scorer is not None
    kept = keep & entries.valid
    open_ = kept
    if not store.plan.format.in_place:
        open_ = kept.clone()
        open_[:, :, : kept.shape[2] - exact] = False
    return Group(
        entries.keys.float(), entries.values.float(), lost, kept, open_,
        {name: entries.meta[name] for name in merger.state_names},
        entries.scores,
        from_newest(entries.valid) > scorer.unscored,
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

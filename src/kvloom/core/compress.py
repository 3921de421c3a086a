"""One compression of a layer: how much may stay, who stays, and what becomes of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.block import Block, granules, uniform
from kvloom.core.compaction import compact
from kvloom.core.entries import Entries
from kvloom.core.fold import fold_losers, fold_oldest
from kvloom.core.forward import Forward
from kvloom.core.policy import select
from kvloom.core.view import entries_of

if TYPE_CHECKING:
    from kvloom.core.store import LayerStore


def compress_if_due(store: LayerStore, pending: Block, forward: Forward, capacity: Tensor) -> Block:
    """Evict (or fold) where the schedule says so; returns the exact entries that stay.

    If a scorer raises, nothing is evicted, and `pending` becomes the tail as it is.
    """
    zero = torch.zeros_like(capacity)
    pinned = zero if store.sinks is None else store.sinks.count
    length = store.pool.live + pending.count + pinned
    target, due = _target(store, length, capacity, forward)
    if not bool(due.any()):
        return pending
    cells = due[:, None] if store.plan.pools else target != length
    try:
        if store.plan.drops_oldest:
            pending = _drop_oldest(store, pending, forward, length - target)
        else:
            pending = _compress(store, pending, forward, capacity, target, pinned, due)
    except Exception:
        store.tail = pending.owned(pending.longest)
        raise
    store.since = store.since.masked_fill(cells, 0)
    return pending


def _target(
    store: LayerStore, length: Tensor, capacity: Tensor, forward: Forward
) -> tuple[Tensor, Tensor]:
    """Entries to keep, host `[B, H]`, or `[B, 1]` for all heads together if the allocator pools
    them; and which rows are due, bool `[B]`.
    """
    heads, scorer = 1, store.plan.recipe.scorer
    assert scorer is not None
    seen, since, new = store.seen[:, None], store.since, forward.tokens[:, None]
    if scorer.sets_target:
        target = torch.minimum(scorer.target(length, seen, new), length)
        return target, (target != length).any(1)
    schedule, heads_capacity = store.plan.recipe.schedule, capacity
    if store.plan.pools:
        heads = length.shape[1]
        length, capacity = length.sum(1, keepdim=True), capacity.sum(1, keepdim=True)
        since = since.amin(1, keepdim=True)
    target = schedule.target(length, capacity, seen, new, since, heads)
    if store.plan.shared_out and store.plan.bounded:  # with more rows than before, it does not wait
        peak = schedule.peak(heads_capacity)
        peak = peak.sum(1, keepdim=True) if store.plan.pools else peak
        target = torch.where(target > peak, capacity, target)
    return target, (target != length).any(1)


def _compress(
    store: LayerStore,
    pending: Block,
    forward: Forward,
    capacity: Tensor,
    target: Tensor,
    pinned: Tensor,
    due: Tensor,
) -> Block:
    """Down to `target` entries, sinks included."""
    scorer = store.plan.recipe.scorer
    assert scorer is not None
    if store.plan.changes_pages and any(slab.shared for slab in store.pool.slabs):
        compact(store.pool)  # rows that share pages get copies of their own
    entries = entries_of(store, pending, forward.call)
    protected = scorer.protected((target if scorer.sets_target else capacity) - pinned)
    if store.plan.pools:
        free = target - pinned.sum(1, keepdim=True)
        entries.target = (free // capacity.shape[1]).expand_as(capacity)
        protected = torch.minimum(protected, entries.target)
        scores = scorer.rank(entries, protected)
        target = _split(store, scores, entries, free[:, 0], pinned, capacity, due)
    else:
        target = entries.target = target - pinned
        scores = scorer.rank(entries, torch.minimum(protected, target))
    keep = select(scores, entries, target)
    pending, folded = fold_losers(store, entries, keep, pending)
    return _remove(store, pending, keep, folded)


def _drop_oldest(store: LayerStore, pending: Block, forward: Forward, n: Tensor) -> Block:
    """Move the start of each head by `n [B, H]` (host); the device is not waited for."""
    folded: int | None = 0
    if store.plan.merger is not None:
        folded = fold_oldest(store, entries_of(store, pending, forward.call), pending, n)
    sealed = torch.minimum(n, store.pool.live)
    store.pool.drop_oldest(sealed)
    exact = n - sealed
    if bool(exact.any()):
        pending = _without_oldest(store, pending, exact)
    _note(store, int(n.sum()), folded)
    return pending


def _without_oldest(store: LayerStore, pending: Block, n: Tensor) -> Block:
    """What is left without the oldest `n [B, H]`. The tail is only copied if that saves room; otherwise
    once, for many tokens, when it has none left.
    """
    first, left = uniform(n), pending.count - n
    fits = pending.allocated <= granules(store.tail_room(int(left.max())))
    if pending is not store.tail or pending.size is None or first is None or not fits:
        return pending.span(n, left)
    store.tail = pending.without_oldest(first)
    return store.tail


def _remove(store: LayerStore, pending: Block, keep: Tensor, folded: int | None) -> Block:
    """Mark dead what `keep` leaves out, and count it; returns the exact entries that stay."""
    before = store.pool.live + pending.count
    sealed = keep.shape[2] - pending.longest
    store.pool.evict(keep[:, :, :sealed])
    exact = keep[:, :, sealed:]
    count = exact.sum(-1).cpu()
    if not torch.equal(count, pending.count):
        store.tail = pending = pending.keep(exact, count, store.tail_room(int(count.max())))
    gone = int((before - store.pool.live - pending.count).sum())
    _note(store, gone, folded)
    return pending


def _note(store: LayerStore, gone: int, folded: int | None) -> None:
    """Count what a compression took away and how much of it lives on (None: all), and free its room
    if that pays.
    """
    store.counters.compressions += 1
    store.counters.evicted += gone
    store.counters.merged += gone if folded is None else folded
    store.reclaim()


def _split(
    store: LayerStore,
    scores: Tensor,
    entries: Entries,
    free: Tensor,
    pinned: Tensor,
    capacity: Tensor,
    due: Tensor,
) -> Tensor:
    """What the allocator leaves to each head of `free [B]`, within the layer's bytes.

    Unequal heads cost more than equal ones (whole pages, rectangular metadata), so a budget in
    bytes takes from the sum until they fit. Rows that are not due keep what they have.
    """
    plan, live = store.plan, entries.valid.sum(-1).cpu()
    assert plan.recipe.allocator is not None
    allowed = [plan.ceiling(row[None]) for row in capacity]
    unpaged = plan.unpaged_cells(capacity)[:, 0].tolist()
    # a share is for each row as if it were alone; a fixed number of bytes is for the batch, whose
    # rectangular metadata may be as wide as any row can make it
    most = plan.recipe.allocator.largest(plan.recipe.schedule.peak(capacity))
    widest = 0 if plan.growing else int(most.max())
    while True:
        split = plan.recipe.allocator.split(scores, entries.valid, free)
        split = torch.where(due[:, None], split, live)
        if plan.counts_entries:
            return split
        peaks = plan.recipe.schedule.peak(split + pinned)
        costs = [
            plan.cost.nbytes(row, widest=widest, paged=not whole)
            for row, whole in zip(peaks, unpaged, strict=True)
        ]
        over = due & torch.tensor([c > a for c, a in zip(costs, allowed, strict=True)])
        if not bool(over.any()):
            return split
        free = torch.where(over, free - (free // 32).clamp_min(1), free)

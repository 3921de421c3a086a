"""What the policies, and anyone who asks, see of a `LayerStore`: its entries, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.block import Block, take_slots
from kvloom.core.entries import Entries
from kvloom.core.format import PAGE

if TYPE_CHECKING:
    from kvloom.core.attend import Call
    from kvloom.core.store import LayerStore


def entries_of(
    store: LayerStore, pending: Block | None = None, call: Call | None = None
) -> Entries:
    """Pages, then the exact entries (`pending`, by default the tail); `call` is the last forward's."""
    exact = store.tail if pending is None else pending
    n, plan, slabs = exact.longest, store.plan, store.pool.slabs
    valid = torch.cat([*(slab.valid() for slab in slabs), exact.valid(n)], dim=2)
    meta = {
        name: torch.cat(
            [*(s.meta[name][:, :, : s.pages * PAGE] for s in slabs), exact.meta[name][:, :, :n]], 2
        )
        for name in plan.meta
        if name in plan.page_meta or not slabs
    }
    if plan.base_positions:
        parts = [*(s.positions() for s in slabs), exact.meta["positions"][:, :, :n]]
        meta["positions"] = torch.cat(parts, 2)
    keys, values, pre_rope_keys = _readers(store, exact, n, meta)
    entries = Entries(
        valid,
        meta,
        keys,
        values,
        pre_rope_keys,
        layer=plan.layer,
        layers=plan.layers,
        tiled=0 if plan.format.movable else valid.shape[2] - n,
        memory=store.memory,
        output_weight=plan.output_weight,
        rope=plan.rope,
    )
    if call is not None:
        entries.scale, entries.softcap = call.scale, call.softcap
    return entries


def _readers(
    store: LayerStore, exact: Block, n: int, meta: dict[str, Tensor]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """Readers of rotated keys, values, and keys before rotation; pages are decoded at most once."""
    decoded: list[tuple[Tensor, Tensor] | None] = []

    def sealed(which: int) -> Tensor | None:
        if not decoded:
            decoded.append(store.pool.decode_all())
        return None if decoded[0] is None else decoded[0][which]

    def beside(old: Tensor | None, new: Tensor) -> Tensor:
        return new if old is None else torch.cat([old, new], 2)

    def values() -> Tensor:
        return beside(sealed(1), exact.values[:, :, :n])

    def keys() -> Tensor:
        old = sealed(0)
        if old is not None and store.plan.pre_rope:
            old = store.rotate(old, meta["positions"][:, :, : old.shape[2]])
        return beside(old, exact.keys[:, :, :n])

    def pre_rope_keys() -> Tensor:
        assert store.plan.rope is not None
        if not store.plan.pre_rope:
            return store.plan.rope.unrotate(keys(), meta["positions"])
        new = store.plan.rope.unrotate(exact.keys[:, :, :n], exact.meta["positions"][:, :, :n])
        old = sealed(0)
        return beside(None if old is None else old.float(), new)

    return keys, values, pre_rope_keys


def dense_of(store: LayerStore) -> tuple[Tensor, Tensor] | None:
    """Everything stored as attention uses it, `[B, H, S, D]`, right-aligned; None if empty.

    Slots on the left that a row does not fill hold arbitrary finite entries.
    """
    n = int(store.stored.max())
    if n == 0:
        return None
    entries, blocks = entries_of(store), [] if store.sinks is None else [store.sinks]
    parts = [(b.keys[:, :, : b.longest], b.values[:, :, : b.longest], b.valid()) for b in blocks]
    parts.append((entries.keys, entries.values, entries.valid))
    keys, values, valid = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    order = torch.argsort(valid.to(torch.int8), dim=-1, stable=True)[:, :, -n:]
    return take_slots(keys, order), take_slots(values, order)


def kept_positions(store: LayerStore) -> list[list[list[int]]]:
    """Original positions of the entries kept, `[row][head]`, in order; sinks first.

    Raises ValueError if the recipe keeps no positions.
    """
    if not (store.plan.slot_positions or store.plan.base_positions):
        raise ValueError(
            f"recipe '{store.plan.recipe}' keeps no positions: construct the cache with "
            "track_positions=True"
        )
    entries = entries_of(store)
    blocks = [] if store.sinks is None else [store.sinks]
    held = torch.cat([*(b.meta["positions"] for b in blocks), entries.positions], 2).cpu()
    store.tail.pack()  # looking must not cost bytes
    valid = torch.cat([*(b.valid(b.capacity) for b in blocks), entries.valid], 2).cpu()
    return [
        [h[ok].tolist() for h, ok in zip(row, oks, strict=True)]
        for row, oks in zip(held, valid, strict=True)
    ]

"""Attention over the tiers of a layer: each attends by itself, then all combine exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core import paged
from kvloom.core.block import Block, uniform
from kvloom.core.format import PAGE
from kvloom.core.merge import CentroidMerger
from kvloom.core.native import why_not, why_unread
from kvloom.kernels import cpu_backend, ops, triton_backend

if TYPE_CHECKING:
    from kvloom.core.native import Native
    from kvloom.core.paged import Paged
    from kvloom.core.slab import Segment, Slab
    from kvloom.core.store import LayerStore

Partial = tuple[Tensor, Tensor]


@dataclass
class Call:
    """One forward's attention in a layer.

    Attributes:
        query: `[B, H, G, Q, D]`. scale, softcap: of the logits.
        sink_logits: `[H, G]`, a model's learned sinks, or None.
        new_mask: bool `[B, 1, Q, Q]` among the new tokens, or None for plain causality.
        past_mask: bool `[B, 1, Q, past]` given by the user, or None.
        voters: bool `[B, Q]`, False for padded queries, or None.
        positions: `[B, Q]` of the queries.
    """

    query: Tensor
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    new_mask: Tensor | None = None
    past_mask: Tensor | None = None
    voters: Tensor | None = None
    positions: Tensor | None = None


@dataclass
class Tier:
    """A run of entries that one kernel call reads; views, decoded on the spot."""

    rows: slice
    heads: slice
    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False


ALL = slice(None)


def attend(store: LayerStore, call: Call, new: Block | None) -> tuple[Tensor, Tensor | None]:
    """`(out [B, H, G, Q, E], lse [B, H, G, Q])` over everything the layer holds and `new`.

    `lse` is None unless the recipe observes attention.

    `new` are the tokens of this forward as a causal chunk, or None if they are in the tail.
    """
    if new is None and _native(store, call) and _kernel_reads_centroids(store):
        store.native.raw = None
        return store.native.attend(store, call, _centroids(store, call), call.sink_logits)
    parts = partials(store, call, new)
    if store.plan.observes or call.sink_logits is not None:
        return ops.combine(parts, call.sink_logits)
    return ops.combine_outputs(parts), None


def partials(
    store: LayerStore, call: Call, new: Block | None, centroids: bool = True
) -> list[Partial]:
    """Every tier's `(out, lse)`, as `attend` combines them; those of the centroids can be left out."""
    store.native.raw = None  # of an earlier forward that was given up
    if _native(store, call):
        return _native_partials(store, call, new, centroids)
    if _paged(store, call):
        return _paged_partials(store, call, new, centroids)
    parts = [_sinks_partial(store, call)] if store.sinks is not None and store.sinks.longest else []
    with_tail = _pages_and_tail(store, call)
    turned, reader = _turned(store, call), _reader(store)
    if reader is not None and store.pool.slabs and not store.plan.format.in_place:
        parts.append(_decoded_partial(store, turned, reader))
    else:
        for slab in store.pool.slabs:
            if with_tail is None or slab is not store.open:
                parts.append(_slab_partial(store, slab, turned))
    if with_tail is not None:
        parts.append(_partial(with_tail, call, call.query))
    if centroids and store.centroids is not None and store.centroids.longest:
        parts.append(_partial(*centroid_tier(store, call)))
    rest = _exact_tiers(store, call, new, tail=with_tail is None)
    parts += [_partial(tier, call, call.query) for tier in rest]
    return parts


def _native(store: LayerStore, call: Call) -> bool:
    """Whether the C++ kernels serve this call."""
    reason = why_not(store, call)
    short = call.query.shape[3] <= cpu_backend.QUERIES
    if reason is not None and short and ops.forced_backend() == "cpu":
        raise RuntimeError(f"KVLOOM_BACKEND=cpu cannot serve this call: {reason}")
    return reason is None


def _native_partials(
    store: LayerStore, call: Call, new: Block | None, centroids: bool
) -> list[Partial]:
    beside = _centroids(store, call) if centroids and _kernel_reads_centroids(store) else None
    parts = [store.native.attend(store, call, beside)]
    if centroids and not _kernel_reads_centroids(store):
        parts.append(_partial(*centroid_tier(store, call)))
    if new is not None:
        parts += [_partial(t, call, call.query) for t in _exact_tiers(store, call, new, tail=False)]
    return parts


def _kernel_reads_centroids(store: LayerStore) -> bool:
    """Whether centroids, if there are any, are seen by the queries that everything else is."""
    held, merger = store.centroids, store.plan.merger
    if held is None or not held.longest:
        return True
    assert isinstance(merger, CentroidMerger)
    return merger.rotated or merger.placing != "positionless"


def _centroids(store: LayerStore, call: Call) -> Tier | None:
    held = store.centroids
    return centroid_tier(store, call)[0] if held is not None and held.longest else None


def _paged(store: LayerStore, call: Call) -> bool:
    """Whether the Triton kernels serve this call."""
    reason = paged.why_not(store, call)
    short = call.query.shape[3] <= triton_backend.QUERIES
    if reason is not None and short and ops.forced_backend() == "triton":
        raise RuntimeError(f"KVLOOM_BACKEND=triton cannot serve this call: {reason}")
    return reason is None


def _paged_partials(
    store: LayerStore, call: Call, new: Block | None, centroids: bool
) -> list[Partial]:
    held = None
    if centroids and store.centroids is not None and store.centroids.longest:
        tier, _, query = centroid_tier(store, call)
        held = paged.exact(query, tier.keys, tier.values, tier.keys.shape[2], tier.bias)
    parts = paged.of(store).attend(store, call, held)
    if new is not None:
        parts += [_partial(t, call, call.query) for t in _exact_tiers(store, call, new, tail=False)]
    return parts


def _sinks_partial(store: LayerStore, call: Call) -> Partial:
    tier = _pinned(store)
    assert tier is not None
    query = store.sink_query(call.query) if store.plan.in_cache else call.query
    return _partial(tier, call, query)


def _partial(tier: Tier, call: Call, query: Tensor) -> Partial:
    if tier.causal:
        return ops.causal_attention(
            query, tier.keys, tier.values, scale=call.scale, softcap=call.softcap, mask=tier.mask
        )
    return ops.partial_attention(
        query, tier.keys, tier.values,
        scale=call.scale, softcap=call.softcap, bias=tier.bias, mask=tier.mask,
    )  # fmt: skip


def _turned(store: LayerStore, call: Call) -> Call:
    """`call` with queries in the basis in which pages hold their keys."""
    if not store.plan.format.turns or not store.pool.slabs:
        return call
    return replace(call, query=store.plan.format.turn_query(call.query, store.pool.tables))


def _slab_partial(store: LayerStore, slab: Slab, call: Call) -> Partial:
    """A slab's partial result; `call` is turned already."""
    out, lse = _slab_runs(store, slab, call)
    return store.plan.format.turn_back(out, store.pool.tables), lse


def _slab_runs(store: LayerStore, slab: Slab, call: Call) -> Partial:
    segments = slab.segments()
    if len(segments) == 1 and segments[0].covers(*call.query.shape[:2]):
        return _partial(_slab_tier(store, slab, segments[0], call), call, call.query)
    lse = call.query.new_full(call.query.shape[:-1], float("-inf"), dtype=torch.float32)
    out = call.query.new_zeros((*lse.shape, store.plan.value_dim), dtype=torch.float32)
    for segment in segments:
        tier = _slab_tier(store, slab, segment, call)
        where = (tier.rows, tier.heads)
        part_out, part_lse = _partial(tier, call, call.query[where])
        out[where], lse[where] = part_out.float(), part_lse
    return out, lse


def _pages_and_tail(store: LayerStore, call: Call) -> Tier | None:
    """The last slab and the tail as one run, if the tail lies right behind the pages."""
    if store.open is None or store.open.holes or call.past_mask is not None:
        return None
    run = store.open.with_next_page()
    if run is None or not store.tail.longest:
        return None
    n = (run.pages - 1) * PAGE + store.tail.longest
    return Tier(ALL, ALL, run.slot["keys"].narrow(2, 0, n), run.slot["values"].narrow(2, 0, n))


def _slab_tiers(store: LayerStore, slab: Slab, call: Call) -> Iterator[Tier]:
    """A slab as tiers: one, decoded by the Triton kernels, or one for each run."""
    if not store.plan.format.in_place and paged.why_unread(store) is None:
        decoded = paged.of(store).read(store, slab)
        yield _decoded_tier(store, [slab], call, decoded)
        return
    for segment in slab.segments():
        yield _slab_tier(store, slab, segment, call)


def _slab_tier(store: LayerStore, slab: Slab, segment: Segment, call: Call) -> Tier:
    skip = slab.skipped(segment)
    where = (segment.rows, segment.heads, slice(skip or 0, segment.pages * PAGE))
    keys, values = store.pool.read(segment, slab, skip or 0)
    if store.plan.pre_rope:
        keys = store.rotate(keys, slab.positions()[where])
    bias = _slab_bias(slab, where, masked=slab.holes and skip is None)
    mask = None
    if call.past_mask is not None:
        start = store.pool.offset(slab)
        n = keys.shape[2]
        mask = call.past_mask[segment.rows, :, :, start : start + n]
    return Tier(segment.rows, segment.heads, keys, values, bias, mask)


def _slab_bias(slab: Slab, where: tuple[slice, slice, slice], masked: bool) -> Tensor | None:
    """Log mass, and -inf for dead slots if they are `masked`."""
    bias = None
    if masked:
        alive = slab.valid()[where]
        bias = torch.zeros_like(alive, dtype=torch.float32).masked_fill(~alive, float("-inf"))
    if "mass" in slab.meta:
        mass = slab.meta["mass"][where]
        bias = mass if bias is None else bias + mass
    return bias


def _reader(store: LayerStore) -> Native | Paged | None:
    """The kernels that decode pages, if any do."""
    if why_unread(store) is None:
        return store.native
    return paged.of(store) if paged.why_unread(store) is None else None


def _decoded_partial(store: LayerStore, call: Call, reader: Native | Paged) -> Partial:
    """All pages, decoded by the kernels into a workspace, for queries that are many."""
    tier = _decoded_tier(store, store.pool.slabs, call, reader.read_all(store))
    out, lse = _partial(tier, call, call.query)
    return store.plan.format.turn_back(out, store.pool.tables), lse


def _decoded_tier(
    store: LayerStore, slabs: list[Slab], call: Call, decoded: tuple[Tensor, Tensor]
) -> Tier:
    """Whole slabs side by side, given their keys and values as pages hold them."""
    keys, values = decoded
    if store.plan.pre_rope:
        keys = store.rotate(keys, torch.cat([slab.positions() for slab in slabs], 2))
    masked = any(slab.holes or uniform(slab.used) is None for slab in slabs)
    where = [(ALL, ALL, slice(0, slab.pages * PAGE)) for slab in slabs]
    found = [_slab_bias(slab, at, masked) for slab, at in zip(slabs, where, strict=True)]
    biases, mask = [x for x in found if x is not None], None  # all of them, or none
    if call.past_mask is not None:
        start = store.pool.offset(slabs[0])
        mask = call.past_mask[..., start : start + keys.shape[2]]
    return Tier(ALL, ALL, keys, values, torch.cat(biases, 2) if biases else None, mask)


def _pinned(store: LayerStore) -> Tier | None:
    return None if store.sinks is None else _block_tier(store.sinks)


def _block_tier(block: Block, causal: bool = False) -> Tier | None:
    """The used part of a block; slots past a ragged end are masked by the bias."""
    n = block.longest
    if n == 0:
        return None
    bias = None
    if block.size is None:
        bias = torch.zeros(*block.count.shape, n, device=block.keys.device)
        bias = bias.masked_fill(~block.valid(n), float("-inf"))
    if "mass" in block.meta:
        mass = block.meta["mass"][:, :, :n]
        bias = mass if bias is None else bias + mass
    keys, values = block.keys.narrow(2, 0, n), block.values.narrow(2, 0, n)
    return Tier(ALL, ALL, keys, values, bias, causal=causal)


def centroid_tier(store: LayerStore, call: Call) -> tuple[Tier, Call, Tensor]:
    """The centroids where they stand, the call, and its queries as the centroids must see them."""
    held, merger, rope = store.centroids, store.plan.merger, store.plan.rope
    assert held is not None and isinstance(merger, CentroidMerger)
    n, query = held.longest, call.query
    bias = merger.bias(held)[:, :, :n]
    if held.size is None:
        bias = bias.masked_fill(~held.valid(n), float("-inf"))
    keys = held.keys.narrow(2, 0, n)
    if not merger.rotated:
        assert rope is not None
        at = held.meta["positions"][:, :, :n]
        if merger.placing == "slot":
            at = store.slots_before(at, held)
        elif merger.placing == "positionless":  # turn the queries to where all centroids are: 0
            assert call.positions is not None
            at = torch.zeros_like(at)
            by = -call.positions[:, None, None].expand(query.shape[:4])
            query = rope.shift(query, by).to(query.dtype)
        keys = store.rotate(keys, at)
    values = held.values.narrow(2, 0, n).to(store.plan.dtype)
    return Tier(ALL, ALL, keys.to(store.plan.dtype), values, bias), call, query


def _exact_tiers(
    store: LayerStore, call: Call, new: Block | None, tail: bool = True
) -> Iterator[Tier]:
    newest = _block_tier(store.tail) if tail else None
    if newest is not None:
        if call.past_mask is not None:
            newest.mask = call.past_mask[..., call.past_mask.shape[-1] - newest.keys.shape[2] :]
        yield newest
    if new is not None:
        causal = _block_tier(new, causal=True)
        assert causal is not None
        causal.mask = call.new_mask
        yield causal


def attention_mass(store: LayerStore, call: Call, new: Block | None, lse: Tensor) -> Tensor:
    """Attention received by each evictable entry, `[B, H, S]`: pages, then tail, then `new`.

    The C++ kernels kept the logits of the first pass; elsewhere a second one over the keys, given its
    normaliser.
    """
    columns, turned = [], _turned(store, call)
    kept = store.native.raw is not None
    in_place = kept or not store.pool.slabs
    if kept:
        columns.append(store.native.mass(store, call, lse))
    elif not in_place and paged.why_not(store, call) is None:
        columns.append(paged.of(store).mass(store, call, lse))
        in_place = True
    for slab in () if in_place else store.pool.slabs:
        received = call.query.new_zeros((*slab.first.shape, slab.pages * PAGE), dtype=torch.float32)
        for tier in _slab_tiers(store, slab, call):
            where = (tier.rows, tier.heads)
            received[where][:, :, : tier.keys.shape[2]] = _mass(tier, turned, lse[where])
        columns.append(received)
    tail = None if kept else _block_tier(store.tail)
    columns += [] if tail is None else [_mass(tail, call, lse)]
    causal = None if new is None else _block_tier(new)
    if causal is not None:  # None too if every new token was a rejected draft
        causal.mask, causal.causal = call.new_mask, call.new_mask is None
        columns.append(_mass(causal, call, lse))
    if not columns:
        return call.query.new_zeros((*call.query.shape[:2], 0), dtype=torch.float32)
    return torch.cat(columns, dim=2)


def _mass(tier: Tier, call: Call, lse: Tensor) -> Tensor:
    return ops.attention_mass(
        call.query[tier.rows, tier.heads], tier.keys, lse,
        scale=call.scale, softcap=call.softcap, bias=tier.bias, mask=tier.mask,
        voters=None if call.voters is None else call.voters[tier.rows], causal=tier.causal,
    )  # fmt: skip

"""Decoding in fixed memory: what CUDA graphs and torch.compile need.

A captured step does the same launches on the same addresses for ever. So new tokens go to a tail of fixed
capacity, lengths live on the device, and the tables of pages (addresses, cells, splits) have room to grow:
a step appends, attends over pages, tail, sinks and centroids, and waits for nothing. Policies run between
steps: `flush` hands the tokens of the tail to the layer's store, with the queries and normalisers that
scorers look at, as one forward, which selects, merges and seals as any other, and tells the tables. Nothing
is captured again.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvloom.core import paged
from kvloom.core.attend import Call, centroid_tier
from kvloom.core.block import take_slots
from kvloom.core.merge import CentroidMerger
from kvloom.core.plan import QUERIES
from kvloom.core.store import LayerStore
from kvloom.kernels import ops, triton_backend
from kvloom.kernels.triton_backend import Exact, Pages

SLABS = 32  # allocations of pages for which there is room
_LAYERS: WeakValueDictionary[int, FixedLayer] = WeakValueDictionary()


def why_not(store: LayerStore) -> str | None:
    """The reason why a layer cannot decode in fixed memory, or None."""
    if not store.takes_token:
        return "the sinks are not full yet: prefill first"
    if not store.pool.slabs and not store.plan.format.in_place:
        return "there are no pages yet: prefill first"
    return paged.why_unread(store)


def longest_tail(store: LayerStore) -> int:
    """How many entries of a head the exact tail may come to hold between forwards."""
    plan, capacity = store.plan, store.capacity()
    page = plan.format.residual + triton_backend.PAGE
    if capacity is None or not bool(plan.unpaged_cells(capacity).any()):
        return page
    return max(page, plan.unpaged * (plan.heads if plan.pools else 1))


class FixedLayer:
    """A layer's store, and what a step reads and writes.

    Attributes:
        keys, values: `[B, H, slots, W]`, the tail; count: int32 `[B * H]`, how many are in use.
        since: int64 `[1]`, steps since the last flush. bias: fp32 `[B, H, slots]`, log masses, or None.
        queries, lses: of these steps, `[B, H, G, steps, D]` and `[B, H, G, steps]`, empty if no policy asks.
        pages: the tables, with room.
    """

    def __init__(self, store: LayerStore, steps: int, slabs: int = SLABS):
        """`steps`: tokens that fit in before a `flush`; `slabs`: rows of the tables. Raises ValueError where
        `why_not` has a reason.
        """
        reason = why_not(store)
        if reason is not None:
            raise ValueError(
                f"recipe '{store.plan.recipe}' cannot decode in fixed memory: {reason}"
            )
        self.store, self.steps, self.slabs = store, steps, slabs
        self.scale: float = store.plan.key_dim**-0.5  # until a step says otherwise
        self.softcap: float | None = None
        self.host = paged.Paged()
        self.pages: Pages | None = None
        self._allocate(max(store.tail.longest, longest_tail(store)) + steps)
        self.refresh()
        self.number = id(self)
        _LAYERS[self.number] = self

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def written(self) -> list[Tensor]:
        """What a step changes."""
        return [self.keys, self.values, self.count, self.since, self.queries, self.lses]

    def tensors(self) -> list[Tensor]:
        """What a fixed layer holds beside its store."""
        held = [*self.written(), self.gap, self.sink_keys, self.sink_values, self.sink_count]
        held += [x for x in (self.bias, *self.centroids) if x is not None]
        if self.pages is not None:
            held += [self.pages.table, self.pages.cells, self.pages.splits]
        return held

    def _allocate(self, slots: int) -> None:
        plan, (B, H) = self.store.plan, self.store.tail.count.shape
        D, E, G, n, most = plan.key_dim, plan.value_dim, plan.group, plan.sinks, plan.centroids
        none = torch.zeros((), dtype=plan.dtype, device=self.store.device)
        whole, exact = none.to(torch.int32), none.float()
        self.keys, self.values = (none.new_zeros(B, H, slots, w) for w in (D, E))
        self.sink_keys, self.sink_values = (none.new_zeros(B, H, n, w) for w in (D, E))
        self.count, self.sink_count = (whole.new_zeros(B * H) for _ in range(2))
        self.gap, self.since = whole.new_zeros(B, H).long(), whole.new_zeros(1).long()
        self.bias = exact.new_zeros(B, H, slots) if "mass" in self.store.tail.meta else None
        self.centroids: tuple[Tensor, ...] = ()  # keys, values, bias
        if self.store.centroids is not None:
            self.centroids = tuple(none.new_zeros(B, H, most, w) for w in (D, E))
            self.centroids += (exact.new_zeros(B, H, most),)
        self.queries = none.new_zeros(B, H, G, self.steps if self._looks else 0, D)
        self.lses = exact.new_zeros(B, H, G, self.steps if plan.observes else 0)

    @property
    def _looks(self) -> bool:
        """Whether a policy looks at queries."""
        plan = self.store.plan
        asks = plan.merger is not None and bool(plan.merger.needs & QUERIES)
        return plan.observes or plan.remembers or asks

    # -- between steps -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Tell the step what the store holds now, in place. Raises RuntimeError if there is no room for it."""
        store, tail = self.store, self.store.tail
        if self.slots < tail.longest + self.steps:
            raise RuntimeError(
                f"{tail.longest} exact entries and {self.steps} steps do not fit in {self.slots} slots"
            )
        for block, keys, values, count in (
            (tail, self.keys, self.values, self.count),
            (store.sinks, self.sink_keys, self.sink_values, self.sink_count),
        ):
            if block is not None:
                n = block.longest
                keys[:, :, :n], values[:, :, :n] = block.keys[:, :, :n], block.values[:, :, :n]
                count.copy_(block.count.flatten().to(torch.int32))
        self.since.zero_()
        if self.bias is not None:
            self.bias.zero_()
            self.bias[:, :, : tail.longest] = tail.meta["mass"][:, :, : tail.longest]
        store.next_position = store.seen.to(store.device)  # of the token that comes next
        if store.plan.in_cache and store.sinks is not None and store.sinks.longest:
            self.gap.copy_(store.sink_gap())
        self._centroids()
        self._tables()

    def _centroids(self) -> None:
        held = self.store.centroids
        if held is None:
            return
        keys, values, bias = self.centroids
        bias.fill_(float("-inf"))
        n = held.longest
        if n:  # where they stand does not change before the next flush
            B, H, G, _, D = self.queries.shape
            call = Call(keys.new_zeros(B, H, G, 1, D), 1.0)
            call.positions = self.store.next_position[:, None]
            tier, _, _ = centroid_tier(self.store, call)
            keys[:, :, :n], values[:, :, :n] = tier.keys, tier.values
            assert tier.bias is not None
            bias[:, :, :n] = tier.bias

    def _tables(self) -> None:
        cells = self.store.tail.count.numel()
        told = self.host._told(self.store, cells)
        if self.pages is None:
            programs = 4 * triton_backend.multiprocessors(self.store.device) // cells
            first = paged.no_pages(self.store) if told is None else told
            self.pages = first.roomy(self.slabs, max(1, programs) + self.slabs)
        if told is None:
            self.pages.clear()
        else:
            self.pages.take(told)

    def flush(self, positions: Tensor) -> None:
        """Make the tail's new tokens part of the store; `positions [B, n]` are theirs. Policies run. Without
        tokens (n = 0) what steps did since the last flush is forgotten: rehearsals of a graph.
        """
        n = positions.shape[1]
        if n:
            new = (self.store.tail.count[..., None] + torch.arange(n)).to(self.keys.device)
            keys, values = take_slots(self.keys, new), take_slots(self.values, new)
            query = self.queries[:, :, :, :n]
            if not self._looks:
                B, H = keys.shape[:2]
                query = keys.new_zeros(B, H, 1, n, keys.shape[3])
            call = Call(query, self.scale, self.softcap, positions=positions)
            forward = self.store.stage(keys, values, call, None, positions)
            forward.lse = self.lses[..., :n] if self.store.plan.observes else None
            self.store.commit(forward)
        self.refresh()

    # -- one step ----------------------------------------------------------------------------------

    def step(self, call: Call, key: Tensor, value: Tensor) -> Tensor:
        """Append `key`, `value [B, H, 1, W]` and attend with the call's query `[B, H, G, 1, D]`:
        `[B, H, G, 1, E]`; a call has no masks.
        """
        return self.step_on(call, key, value, self.written())

    def step_on(self, call: Call, key: Tensor, value: Tensor, written: list[Tensor]) -> Tensor:
        """`step` with copies of what is `written`: compilers put them in place of what is changed."""
        keys, values, count, since, queries, lses = written
        plan, cells = self.store.plan, count.shape[0]
        self.scale, self.softcap = call.scale, call.softcap
        query = call.query.contiguous()
        triton_backend.append(
            key.reshape(cells, -1).contiguous(), value.reshape(cells, -1).contiguous(),
            keys, values, count,
        )  # fmt: skip
        tail = paged.exact(query, keys, values, self.slots, self.bias, count)
        parts = paged.attended(
            self.store, call, query, self.pages, tail, self._sinks(query), self._held(query, call)
        )
        lse = None
        if plan.observes or call.sink_logits is not None:
            out, lse = ops.combine(parts, call.sink_logits)
        else:
            out = ops.combine_outputs(parts)
        self._record(query, lse, since, queries, lses)
        return out

    def _sinks(self, query: Tensor) -> Exact | None:
        plan = self.store.plan
        if not plan.sinks:
            return None
        if plan.in_cache:
            assert plan.rope is not None
            by = -self.gap[:, :, None, None].expand(query.shape[:4])
            query = plan.rope.shift(query, by).to(query.dtype)
        return paged.exact(
            query, self.sink_keys, self.sink_values, plan.sinks, count=self.sink_count
        )

    def _held(self, query: Tensor, call: Call) -> Exact | None:
        """The centroids."""
        if not self.centroids:
            return None
        merger, rope = self.store.plan.merger, self.store.plan.rope
        assert isinstance(merger, CentroidMerger)
        if merger.placing == "positionless" and not merger.rotated:
            assert rope is not None and call.positions is not None
            by = -call.positions[:, None, None].expand(query.shape[:4])
            query = rope.shift(query, by).to(query.dtype)
        keys, values, bias = self.centroids
        return paged.exact(query, keys, values, keys.shape[2], bias)

    def _record(
        self, query: Tensor, lse: Tensor | None, since: Tensor, queries: Tensor, lses: Tensor
    ) -> None:
        """Keep what policies will look at; more steps than there is room for overwrite the last one."""
        at = since.clamp_max(self.steps - 1)
        if queries.shape[3]:
            queries.index_copy_(3, at, query)
        if lses.shape[3]:
            assert lse is not None
            lses.index_copy_(3, at, lse.float())
        since += 1


@torch.library.custom_op("kvloom::fixed_step", mutates_args=("written",))
def fixed_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    sink_logits: Tensor | None,
    written: list[Tensor],
    scale: float,
    softcap: float | None,
    layer: int,
) -> Tensor:
    """`FixedLayer.step` as torch.compile sees it; `written`: the layer's; `layer`: its `number`, by which
    what it only reads is found. Raises ValueError if there is no such layer (any more).
    """
    found = _LAYERS.get(layer)
    if found is None:
        raise ValueError(f"layer {layer} is not, or no longer, one that decodes in fixed memory")
    call = Call(query, scale, softcap, sink_logits, positions=positions)
    return found.step_on(call, key, value, written)


@fixed_step.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    sink_logits: Tensor | None,
    written: list[Tensor],
    scale: float,
    softcap: float | None,
    layer: int,
) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1], dtype=torch.float32)

"""Decoding in fixed memory: what CUDA graphs and torch.compile need.

A captured step does the same launches on the same addresses for ever. So new tokens go to a tail of fixed
capacity, lengths live on the device, and the tables of pages (addresses, cells, splits) have room to grow:
a step appends, attends over pages, tail and sinks, and waits for nothing. Policies run between steps:
`flush` hands the tokens of the tail to the layer's store, which selects, merges and seals as in any other
forward, and tells the tables. Nothing is captured again.

What a step cannot do is refused with the reason: watch attention or queries, attend to centroids.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvloom.core import paged
from kvloom.core.attend import Call
from kvloom.core.block import take_slots
from kvloom.core.store import LayerStore
from kvloom.kernels import triton_backend
from kvloom.kernels.triton_backend import Exact, Launch, Pages

SLABS = 32  # allocations of pages for which there is room
_LAYERS: WeakValueDictionary[int, FixedLayer] = WeakValueDictionary()


def why_not(store: LayerStore) -> str | None:
    """The reason why a layer cannot decode in fixed memory, or None."""
    plan = store.plan
    if plan.observes or plan.remembers:
        return f"{plan.recipe.scorer} watches every forward's attention or queries"
    if plan.centroids:
        return f"{plan.merger} keeps centroids, which a step does not read"
    if not store.takes_token:
        return "the sinks are not full yet: prefill first"
    if not store.pool.slabs and not plan.format.in_place:
        return "there are no pages yet: prefill first"
    if "mass" in store.tail.meta:
        return "exact entries have masses"
    return paged.why_unread(store)


class FixedLayer:
    """A layer's store, and what a step reads and writes.

    Attributes:
        keys, values: `[B, H, slots, W]`, the tail; count: int32 `[B * H]`, how many are in use.
        pages: the tables, with room. runs: of pages, at most.
    """

    def __init__(
        self,
        store: LayerStore,
        steps: int,
        scale: float,
        softcap: float | None = None,
        slabs: int = SLABS,
    ):
        """`steps`: tokens that fit in before a `flush`; `slabs`: rows of the tables. Raises ValueError where `why_not` has a reason."""
        reason = why_not(store)
        if reason is not None:
            raise ValueError(
                f"recipe '{store.plan.recipe}' cannot decode in fixed memory: {reason}"
            )
        self.store, self.steps, self.slabs = store, steps, slabs
        self.scale, self.softcap = scale, softcap
        self.host = paged.Paged()
        self.pages: Pages | None = None
        self._allocate(0)
        self.refresh()
        _LAYERS[id(self)] = self

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def tensors(self) -> list[Tensor]:
        """What a fixed layer holds beside its store."""
        held = [
            self.keys,
            self.values,
            self.count,
            self.sink_keys,
            self.sink_values,
            self.sink_count,
        ]
        held += [self.gap]
        if self.pages is not None:
            held += [self.pages.table, self.pages.cells, self.pages.splits]
        return held

    def _allocate(self, slots: int) -> None:
        store, (B, H) = self.store, self.store.tail.count.shape
        D, E, n = store.plan.key_dim, store.plan.value_dim, store.plan.sinks
        none = torch.zeros((), dtype=store.plan.dtype, device=store.device)
        self.keys, self.values = (none.new_zeros(B, H, slots, w) for w in (D, E))
        self.sink_keys, self.sink_values = (none.new_zeros(B, H, n, w) for w in (D, E))
        self.count, self.sink_count = (
            torch.zeros(B * H, dtype=torch.int32, device=store.device) for _ in range(2)
        )
        self.gap = torch.zeros(B, H, dtype=torch.int64, device=store.device)

    # -- between steps -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Tell the step what the store holds now. Allocates, which a captured graph must not outlive, only
        the first time and where there is more exact than there is room.
        """
        store, tail = self.store, self.store.tail
        if self.slots < tail.longest + self.steps:
            if self.slots:
                raise RuntimeError(
                    f"{tail.longest} exact entries and {self.steps} steps do not fit in {self.slots} slots"
                )
            most = store.plan.format.residual + triton_backend.PAGE
            self._allocate(max(tail.longest, most) + self.steps)
        for block, keys, values, count in (
            (tail, self.keys, self.values, self.count),
            (store.sinks, self.sink_keys, self.sink_values, self.sink_count),
        ):
            if block is not None:
                n = block.longest
                keys[:, :, :n], values[:, :, :n] = block.keys[:, :, :n], block.values[:, :, :n]
                count.copy_(block.count.flatten().to(torch.int32))
        if store.plan.in_cache and store.sinks is not None and store.sinks.longest:
            store.next_position = store.seen.to(store.device)  # of the token that comes next
            self.gap.copy_(store.sink_gap())
        self._tables()

    def _tables(self) -> None:
        B, H = self.store.tail.count.shape
        told = self.host._told(self.store, B * H)
        if told is None:
            return
        if self.pages is None:
            runs = (
                max(1, 4 * triton_backend.multiprocessors(self.store.device) // (B * H))
                + self.slabs
            )
            self.pages = told.roomy(self.slabs, runs)
        self.pages.take(told)

    def flush(self, positions: Tensor) -> None:
        """Make the tail's new tokens part of the store; `positions [B, n]` are theirs. Policies run."""
        n = positions.shape[1]
        if n:
            new = (self.store.tail.count[..., None] + torch.arange(n)).to(self.keys.device)
            keys, values = take_slots(self.keys, new), take_slots(self.values, new)
            B, H = keys.shape[:2]
            query = keys.new_zeros(B, H, 1, n, keys.shape[3])
            call = Call(query, self.scale, self.softcap, positions=positions)
            self.store.commit(self.store.stage(keys, values, call, None, positions))
        self.refresh()

    # -- one step ----------------------------------------------------------------------------------

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append `key`, `value [B, H, 1, W]` and attend with `query [B, H, G, 1, D]`: `[B, H, G, 1, E]`."""
        return self.step_on(query, key, value, self.keys, self.values, self.count)

    def step_on(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, count: Tensor
    ) -> Tensor:
        """`step` with another tail: compilers put copies in place of what is changed."""
        B, H, G, Q, D = query.shape
        plan, cells = self.store.plan, B * H
        flat = query.contiguous().view(cells, G * Q, D)
        triton_backend.append(
            key.reshape(cells, -1).contiguous(), value.reshape(cells, -1).contiguous(),
            keys, values, count,
        )  # fmt: skip
        tail = Exact(flat, keys, values, self.slots, count=count)
        sinks = None
        if plan.sinks:
            shifted = flat
            if plan.in_cache:
                assert plan.rope is not None
                by = -self.gap[:, :, None, None].expand(B, H, G, Q)
                shifted = plan.rope.shift(query, by).to(query.dtype).contiguous().view_as(flat)
            sinks = Exact(
                shifted, self.sink_keys, self.sink_values, plan.sinks, count=self.sink_count
            )
        n = 0 if self.pages is None else len(self.pages.splits)
        exact = tail.runs + (0 if sinks is None else sinks.runs)
        launch = Launch(
            cells, H, G * Q, plan.value_dim, plan.dtype, query.device, self.scale, self.softcap, n + exact
        )  # fmt: skip
        if self.pages is not None:
            turned = plan.format.turn_query(query, self.store.pool.tables).contiguous()
            launch.pages(turned.view_as(flat), self.pages)
        launch.exact(tail, sinks, n)
        return self._joined(launch, n, n + exact, (B, H, G, Q))

    def _joined(self, launch: Launch, n: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        plan = self.store.plan
        if not plan.format.turns or not n:
            return launch.combined(0, stop)[0].view(*shape, -1)
        out, lse = (x.view(*shape, *x.shape[2:]) for x in launch.combined(0, n))
        out = plan.format.turn_back(out, self.store.pool.tables)
        other, lse_other = (x.view(*shape, *x.shape[2:]) for x in launch.combined(n, stop))
        share = torch.sigmoid(lse_other - lse)
        return torch.lerp(out, other, share[..., None])


@torch.library.custom_op("kvloom::fixed_step", mutates_args=("tail", "values", "count"))
def fixed_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tail: Tensor,
    values: Tensor,
    count: Tensor,
    layer: int,
) -> Tensor:
    """`FixedLayer.step` as torch.compile sees it; `tail`, `values`, `count`: the layer's, which it
    changes; `layer`: its `id`, by which pages and sinks are found. Raises ValueError if there is no such layer (any more).
    """
    found = _LAYERS.get(layer)
    if found is None:
        raise ValueError(f"layer {layer} is not, or no longer, one that decodes in fixed memory")
    return found.step_on(query, key, value, tail, values, count)


@fixed_step.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tail: Tensor,
    values: Tensor,
    count: Tensor,
    layer: int,
) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1], dtype=torch.float32)

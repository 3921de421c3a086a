"""A layer's pages and exact tiers as the Triton kernels see them: read where they lie."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom.core.format import PAGE
from kvloom.kernels import ops, triton_backend
from kvloom.kernels.triton_backend import Exact, Fields, Launch, Pages

if TYPE_CHECKING:
    from kvloom.core.attend import Call, Partial
    from kvloom.core.block import Block
    from kvloom.core.slab import Slab
    from kvloom.core.store import LayerStore


class Paged:
    """What the kernels know of one `LayerStore`; made anew whenever its slabs have changed."""

    def __init__(self) -> None:
        self.known: list[tuple[weakref.ref[Slab], int, int]] = []
        self.programs = 0
        self.pages: Pages | None = None
        self.constants: dict[str, Tensor] = {}  # tables of levels, on the device

    def attend(
        self, store: LayerStore, call: Call, centroids: Exact | None = None
    ) -> list[Partial]:
        """`(out, lse)` of pages, tail, sinks and `centroids`: one partial result, or two if pages hold
        values in another basis.
        """
        B, H, G, Q, _ = call.query.shape
        query = call.query.contiguous()
        pages = self._told(store, B * H * -(-G * Q // triton_backend.ROWS))
        return attended(store, call, query, pages, *self._exact(store, query), centroids)

    def mass(self, store: LayerStore, call: Call, lse: Tensor) -> Tensor:
        """What the entries of pages receive, fp32 `[B, H, slots]`; `lse [B, H, G, Q]` is that of all tiers."""
        B, H, G, Q, D = call.query.shape
        pages = self._told(store, max(1, self.programs))
        assert pages is not None
        norm = lse.float().clamp_min(torch.finfo(torch.float32).min)
        if call.voters is not None:
            norm = norm.masked_fill(~call.voters[:, None, None], float("inf"))
        turned = store.plan.format.turn_query(call.query, store.pool.tables).contiguous()
        slots = sum(slab.pages for slab in store.pool.slabs) * PAGE
        received = torch.zeros(B * H, slots, dtype=torch.float32, device=store.device)
        launch = _launch(store, call, runs=0)
        launch.mass(turned.view(B * H, G * Q, D), pages, norm.contiguous(), received)
        return received.view(B, H, slots)

    def read(self, store: LayerStore, slab: Slab) -> tuple[Tensor, Tensor]:
        """Keys (before rotation, if pages hold them so) and values of a slab in the basis of the pages,
        `[B, H, slots, W]` in the model's dtype; zeros where a (row, head) has fewer pages.
        """
        pages = self._told(store, max(1, self.programs))
        assert pages is not None
        which = next(i for i, s in enumerate(store.pool.slabs) if s is slab)
        B, H = slab.first.shape
        return triton_backend.decode(pages, which, B, H, slab.pages * PAGE, store.plan.dtype)

    def read_all(self, store: LayerStore) -> tuple[Tensor, Tensor]:
        """See `Native.read_all`."""
        parts = [self.read(store, slab) for slab in store.pool.slabs]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    # -- what the kernels are told -----------------------------------------------------------------

    def _exact(self, store: LayerStore, query: Tensor) -> tuple[Exact, Exact | None]:
        tail, sinks = self._run(store.tail, query), None
        if store.sinks is not None and store.sinks.longest:
            if store.plan.in_cache:
                query = store.sink_query(query)
            sinks = self._run(store.sinks, query)
        return tail, sinks

    @staticmethod
    def _run(block: Block, query: Tensor) -> Exact:
        count = None
        if block.size is None:
            count = block.count.flatten().to(torch.int32).to(query.device, non_blocking=True)
        mass = block.meta.get("mass")
        return exact(query, block.keys, block.values, block.longest, mass, count)

    def _told(self, store: LayerStore, programs: int) -> Pages | None:
        slabs = store.pool.slabs
        if not slabs:
            self.known, self.pages = [], None
            return None
        same = len(slabs) == len(self.known) and self.programs == programs
        if same and all(
            ref() is slab and (version, moves) == (slab.version, slab.moves)
            for (ref, version, moves), slab in zip(self.known, slabs, strict=True)
        ):
            return self.pages
        self.programs, self.pages = programs, self._pages(store, programs)
        self.known = [(weakref.ref(slab), slab.version, slab.moves) for slab in slabs]
        return self.pages

    def _pages(self, store: LayerStore, programs: int) -> Pages:
        slabs, device = store.pool.slabs, store.device
        rows, specs = [], []
        for slab in slabs:
            spec, row = self._row(store, slab)
            rows.append(row)
            specs.append(spec)
        cells = [torch.stack([s.first, s.used, s.skip], -1).flatten(0, 1) for s in slabs]
        rope, frequencies = None, None
        if store.plan.pre_rope:
            turned = store.plan.rope
            assert turned is not None
            made = triton_backend.kernels("spec").Rope
            rope = made(turned.n_rot, turned.pairing == "interleaved", float(turned.scale))
            frequencies = turned.inv_freq.to(device, torch.float32).contiguous()
        return Pages(
            *specs[0], rope, frequencies,
            torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
            torch.stack(cells).to(torch.int32).to(device, non_blocking=True),
            triton_backend.splits([slab.pages for slab in slabs], programs, device),
        )  # fmt: skip

    def _row(self, store: LayerStore, slab: Slab) -> tuple[tuple[Any, Any], list[int]]:
        plan = store.plan
        fields = Fields(
            slab.tile, slab.slot, slab.sets, slab.index, store.pool.tables, self.constants
        )
        parts = plan.format.packed(plan.key_dim, plan.value_dim)
        assert parts is not None
        key, mine = fields.part(parts[0], "keys", plan.key_dim)
        value, its = fields.part(parts[1], "values", plan.value_dim)
        slots: list[int] = []
        for x in (slab.alive, slab.meta.get("mass"), _positions(store, slab)):
            slots += [0, 0] if x is None else [triton_backend.address(x), x.shape[2]]
        return (key, value), [*mine, *its, *slots]


def exact(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    stop: int,
    bias: Tensor | None = None,
    count: Tensor | None = None,
) -> Exact:
    """Exact entries as the kernels see them, with their own `query [B, H, G, Q, D]`."""
    flat = query.contiguous().flatten(0, 1).flatten(1, 2)
    return Exact(
        flat, keys, values, stop, None if bias is None else bias.float().contiguous(), count
    )


def no_pages(store: LayerStore) -> Pages:
    """What the kernels know of a layer with entries in place, before it has pages."""
    plan = store.plan
    key, value = triton_backend.dense(plan.key_dim), triton_backend.dense(plan.value_dim)
    none = torch.zeros(0, store.tail.count.numel(), 3, dtype=torch.int32, device=store.device)
    table = none.new_zeros(0, triton_backend.row_length(), dtype=torch.int64)
    return Pages(key, value, None, None, table, none, none.new_zeros(0, 4))


def _launch(store: LayerStore, call: Call, runs: int) -> Launch:
    B, H, G, Q, _ = call.query.shape
    return Launch(
        B * H, H, G * Q, store.plan.value_dim, store.plan.dtype, store.device, call.scale, call.softcap, runs
    )  # fmt: skip


def attended(
    store: LayerStore,
    call: Call,
    query: Tensor,
    pages: Pages | None,
    tail: Exact,
    sinks: Exact | None,
    centroids: Exact | None,
) -> list[Partial]:
    """Partial results of these tiers, see `Paged.attend`; `query`: the call's, contiguous."""
    plan, (B, H, G, Q, D) = store.plan, query.shape
    n = 0 if pages is None else len(pages.splits)
    behind = n + tail.runs + (0 if sinks is None else sinks.runs)
    stop = behind + (0 if centroids is None else centroids.runs)
    launch = _launch(store, call, stop)
    if pages is not None:
        turned = plan.format.turn_query(query, store.pool.tables).contiguous()
        launch.pages(turned.view(B * H, G * Q, D), pages)
    if behind > n:
        launch.exact(tail, sinks, n)
    if centroids is not None:
        launch.exact(centroids, None, behind)

    def partial(first: int, stop: int) -> Partial:
        out, lse = launch.combined(first, stop)
        return out.view(B, H, G, Q, -1), lse.view(B, H, G, Q)

    if not plan.format.turns or not n:
        return [partial(0, stop)]
    out, lse = partial(0, n)
    back = (plan.format.turn_back(out, store.pool.tables), lse)
    return [back, partial(n, stop)] if stop > n else [back]


def _positions(store: LayerStore, slab: Slab) -> Tensor | None:
    if not store.plan.pre_rope:
        return None
    if slab.base is not None:  # on the CPU only: see `PagePool`
        slab.spell_out_positions()
    return slab.meta["positions"]


_KNOWN: weakref.WeakKeyDictionary[LayerStore, Paged] = weakref.WeakKeyDictionary()


def of(store: LayerStore) -> Paged:
    """What the kernels know of a layer."""
    found = _KNOWN.get(store)
    if found is None:
        found = _KNOWN[store] = Paged()
    return found


def why_not(store: LayerStore, call: Call) -> str | None:
    """The reason why the Triton kernels cannot attend over pages, tail and sinks, or None."""
    if call.query.shape[3] > triton_backend.QUERIES:
        return f"{call.query.shape[3]} queries at once: matrix products are faster"
    if call.past_mask is not None:
        return "a mask addresses columns of the past"
    return why_unread(store)


def why_unread(store: LayerStore) -> str | None:
    """The reason why the Triton kernels cannot read the pages, or None."""
    plan = store.plan
    reason = ops.triton_why_not(store.device, plan.dtype, max(plan.key_dim, plan.value_dim))
    if reason is None and plan.format.packed(plan.key_dim, plan.value_dim) is None:
        return f"{plan.format} does not say how its pages lie in memory"
    return reason

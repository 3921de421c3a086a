"""`LayerStore`: the tiers of one layer, and `commit`, the single place where policies run."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core import fit
from kvloom.core.attend import Call, attend
from kvloom.core.block import GRANULE, Block
from kvloom.core.budget import CellCost
from kvloom.core.compaction import compact
from kvloom.core.compress import compress_if_due
from kvloom.core.format import PAGE
from kvloom.core.forward import Counters, Forward, Sealing, last_valid
from kvloom.core.merge import Memory
from kvloom.core.native import Native
from kvloom.core.observe import observe
from kvloom.core.pages import PagePool
from kvloom.core.plan import LayerPlan
from kvloom.core.slab import Slab
from kvloom.core.unpaged import Unpaged, unsealed

REFRESH = 16  # a growing budget is worked out again at multiples of this many tokens


class LayerStore:
    """All entries of one layer: sinks, pages, centroids, tail."""

    def __init__(self, plan: LayerPlan, keys: Tensor, values: Tensor):
        """`keys`, `values` `[B, H, *, D]` give shapes, dtype and device; nothing is stored yet."""
        B, H = keys.shape[:2]
        device = self.device = keys.device
        self.plan = plan
        meta = {n: torch.zeros(B, H, 0, dtype=d, device=device) for n, d in plan.meta.items()}
        none = torch.zeros(B, H, dtype=torch.int64)
        self.tail = Block(keys[:, :, :0].clone(), values[:, :, :0].clone(), none, meta)
        self.sinks = self.tail.empty() if plan.sinks else None
        self.centroids = self._no_centroids() if plan.centroids else None
        self.pool = PagePool(
            plan.format, plan.place, keys.dtype, device, B, plan.page_meta, plan.base_positions,
            plan.fills_pages,
        )  # fmt: skip
        self.open: Slab | None = None  # the slab whose next page the tail is filling
        self.sealing: Sealing | None = None  # what the last commit sealed, until `settled`
        self.seen = torch.zeros(B, dtype=torch.int64)
        self.since = none  # tokens since the last compression, per (row, head)
        self.next_position = torch.zeros(B, dtype=torch.int64, device=device)
        self._one_each = torch.ones(B, dtype=torch.int64)
        self._one_slot = torch.ones(B, H, dtype=torch.int64)
        self.memory: Memory = {}
        self.merger_memory: Memory = {}
        if plan.merger is not None:
            kept = plan.merger.memory(B, H)
            self.merger_memory = {name: x.to(device) for name, x in kept.items()}
        self.counters = Counters()
        self.native = Native()
        self._capacity: Tensor | None = None
        self._unpaged = Unpaged(none)
        self._capacity_at = self.seen

    def _no_centroids(self) -> Block:
        B, H = self.tail.count.shape
        n, dtype, device = self.plan.centroids, self.plan.centroid_dtype, self.device
        keys = torch.zeros(B, H, n, self.plan.key_dim, dtype=dtype, device=device)
        values = torch.zeros(B, H, n, self.plan.value_dim, dtype=dtype, device=device)
        meta = {
            "mass": torch.full((B, H, n), float("-inf"), device=device),
            "positions": torch.zeros(B, H, n, device=device),
        }
        return Block(keys, values, torch.zeros(B, H, dtype=torch.int64), meta)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def stored(self) -> Tensor:
        """Live entries per (row, head), centroids excluded: host int64 `[B, H]`."""
        pinned = self.sinks.count if self.sinks is not None else 0
        return self.pool.live + self.tail.count + pinned

    def parts(self) -> dict[str, list[Tensor]]:
        """Every tensor that the layer holds, by what it is for."""
        codes, books = self.pool.parts()
        counters = [self.seen, self.since, self._one_each, self._one_slot, self.next_position]
        counters += [self._unpaged.most, self._capacity_at]
        counters += [] if self._capacity is None else [self._capacity]
        before = [] if self.sealing is None else self.sealing.tail.tensors()
        return {
            "pages": codes,
            "tail": self.tail.tensors() + before,
            "page metadata": books,
            "sinks": [] if self.sinks is None else self.sinks.tensors(),
            "centroids": [] if self.centroids is None else self.centroids.tensors(),
            "query memory": [*self.memory.values(), *self.merger_memory.values()],
            "counters": counters,
        }

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer holds."""
        return [t for tensors in self.parts().values() for t in tensors]

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Pre-RoPE keys as attention uses them, in the model's dtype."""
        assert self.plan.rope is not None
        return self.plan.rope.rotate(keys, positions).to(self.plan.dtype)

    def sink_query(self, query: Tensor) -> Tensor:
        """`query [B, H, G, Q, D]` as the sinks must see it for positions in the cache.

        The window sits right before the new tokens already; the sinks are d positions too far
        away, so the query turns back by d.
        """
        assert self.plan.rope is not None
        by = -self.sink_gap()[:, :, None, None].expand(query.shape[:4])
        return self.plan.rope.shift(query, by).to(query.dtype)

    def sink_gap(self) -> Tensor:
        """By how many positions the sinks are too far away, `[B, H]`."""
        assert self.sinks is not None
        window = (self.stored - self.sinks.count).to(self.device, non_blocking=True)
        pinned = self.sinks.count.to(self.device, non_blocking=True)
        first = self.sinks.meta["positions"][..., 0]
        return self.next_position[:, None] - window - pinned - first

    def slots_before(self, positions: Tensor, centroids: Block) -> Tensor:
        """Places of centroids right before the exact entries, in the order of `positions [B, H, n]`."""
        pinned = 0 if self.sinks is None else self.sinks.count
        window = (self.stored - pinned).to(self.device)
        used = centroids.valid(positions.shape[2])
        order = positions.masked_fill(~used, float("inf")).argsort(dim=-1, stable=True)
        end = (self.next_position[:, None] - window)[..., None]
        places: Tensor = end - used.sum(-1, keepdim=True) + order.argsort(dim=-1)
        return places

    def ceiling(self) -> int:
        """Bytes that this layer holds at most after a commit, for the tokens seen so far."""
        capacity = self.capacity()
        assert capacity is not None
        return self.plan.ceiling(capacity)

    # -- one forward -----------------------------------------------------------------------------

    def stage(
        self, keys: Tensor, values: Tensor, call: Call, columns: Tensor | None, positions: Tensor
    ) -> Forward:
        """New tokens `[B, H, Q, D]` as a `Forward`, not yet part of the cache.

        `columns` `[B, Q]` marks valid tokens (None: all), `positions` `[B, Q]` are theirs.
        """
        B, _H, Q, _ = keys.shape
        tokens = torch.full((B,), Q) if columns is None else columns.sum(1).cpu()
        return Forward(
            self._arrived(keys, values, positions), call, tokens, positions, columns=columns
        )

    def _arrived(self, keys: Tensor, values: Tensor, positions: Tensor) -> Block:
        B, H, Q, _ = keys.shape
        scorer, merger = self.plan.recipe.scorer, self.plan.merger
        meta = {} if scorer is None else dict(scorer.arrive(keys, values))
        for name in () if merger is None else merger.state_names:
            meta[name] = torch.zeros(B, H, Q, device=keys.device)
        if self.plan.positions:
            meta["positions"] = positions.to(torch.int32)[:, None].expand(B, H, Q)
        if Q == 1:
            return Block.token(keys, values, self._one_slot, meta)
        return Block(keys, values, torch.full((B, H), Q), meta)

    def forward(
        self, keys: Tensor, values: Tensor, call: Call, columns: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Forward]:
        """Attend with new tokens (see `stage`); they become part of the cache in `commit`."""
        forward = self.stage(keys, values, call, columns, positions)
        call.positions = positions
        if self.plan.in_cache or self.plan.slots_centroids:
            before = (forward.tokens - 1).to(self.device)
            self.next_position = last_valid(positions, columns) - before
        out, lse = attend(self, call, forward.block)
        forward.lse = lse
        return out, forward

    def forward_token(
        self, keys: Tensor, values: Tensor, call: Call, positions: Tensor
    ) -> tuple[Tensor, Forward]:
        """`forward` for one valid token per row that goes straight into the tail."""
        token = self._arrived(keys, values, positions)
        call.positions = positions
        if self.plan.in_cache or self.plan.slots_centroids:
            self.next_position = positions[:, -1].to(torch.int64) + 1
        self.tail = self.tail.reserve(self.tail.longest + 1)
        before = self.tail.count
        self.tail.append_token(token)
        try:
            out, lse = attend(self, call, None)
        except BaseException:
            self.tail = self.tail.shrunk(before)
            raise
        return out, Forward(token, call, self._one_each, positions, lse, in_tail=True)

    @property
    def takes_token(self) -> bool:
        """Whether a single new token may go straight into the tail (the sinks are full)."""
        return self.sinks is None or self.sinks.size == self.plan.sinks

    def commit(self, forward: Forward, drop: int = 0) -> None:
        """Make the new tokens part of the cache: append, observe, select, merge, seal.

        `drop` leaves out the newest columns (rejected drafts of assisted decoding).
        """
        self.sealing = None
        new = None if forward.in_tail else forward.without_newest(drop)
        observe(self, forward, new)
        self.seen = self.seen + forward.tokens
        self.since = self.since + forward.tokens[:, None]
        if new is None:
            pending = self.tail
        else:
            if forward.columns is not None:
                count = forward.tokens[:, None].expand_as(new.count).contiguous()
                new = new.keep(forward.columns[:, None].expand(new.keys.shape[:3]), count)
            pending = self.tail.join(self._pin(new))
        self._settle(pending, forward)
        self.tail.pack()

    def _pin(self, new: Block) -> Block:
        """Move the first tokens of each row into the sinks; returns the rest."""
        if self.sinks is None:
            return new
        take = torch.minimum(self.plan.sinks - self.sinks.count, new.count)
        if not bool((take > 0).any()):
            return new
        pinned = self.sinks.join(new.span(torch.zeros_like(take), take))
        self.sinks = pinned.owned(pinned.longest, granule=1)
        return new.span(take, new.count - take)

    # -- policies --------------------------------------------------------------------------------

    def capacity(self) -> Tensor | None:
        """C per (row, head) for the tokens seen so far; None if nothing is ever evicted."""
        if not self.plan.evicts:
            return None
        if not self.plan.growing:
            if self._capacity is None:
                self._capacity = self.plan.capacity(self.seen)
            return self._capacity
        # a function of each row's length alone, so that batching and chunking cannot change it
        seen = self.seen // REFRESH * REFRESH
        if self._capacity is None:
            self._capacity, self._capacity_at = self.plan.capacity(seen), seen
        elif bool((seen > self._capacity_at).any()):
            fresh = self.plan.capacity(seen)
            assert fresh is not None  # whole pages round unevenly: never less than before
            self._capacity = torch.maximum(fresh, self._capacity)
            self._capacity_at = torch.maximum(seen, self._capacity_at)
        return self._capacity

    def _settle(self, pending: Block, forward: Forward) -> None:
        """Compress if it is due, then seal full pages; what is left is the tail."""
        capacity = self.capacity()
        limit = None
        if capacity is not None:
            self._unpaged.judge(self.plan, capacity)
            pending = compress_if_due(self, pending, forward, capacity)
            limit = self._page_limit(capacity)
        spared = self._spared(pending)
        leaves = spared is not None and bool((self.pool.pages[spared] > 0).any())
        if spared is not None and leaves:
            pending = unsealed(self, pending, spared)
        pages = self._full_pages(pending, spared)
        if pages is not None:
            try:
                self._seal(pending, pages, limit, forward)
            except Exception:  # a format failed: everything stays exact
                self.tail = pending.owned(pending.longest)
                raise
            if leaves:  # the tail before has not what was in pages then
                self.sealing = None
        elif pending is not self.tail:
            self._keep(pending, self.tail_room(pending.longest))

    def tail_room(self, longest: int) -> int:
        """Slots per head for a tail of `longest` entries: one more than that, if the budget has it."""
        return min(longest + 1, max(longest, self._unpaged.room))

    def _spared(self, exact: Block) -> Tensor | None:
        """Cells that need no pages, now that `exact` is what is not in pages: host bool `[B, H]`; None if
        nobody has or could fill one.
        """
        if not self._unpaged.some or not (self.pool.slabs or self._fills_a_page(exact)):
            return None
        return self._unpaged.fits(self.plan, self.pool.live + exact.count)

    def _fills_a_page(self, exact: Block) -> bool:
        full = PAGE + self.plan.format.residual
        return exact.longest >= full and exact.longest > self._unpaged.room

    def _full_pages(self, exact: Block, spared: Tensor | None) -> Tensor | None:
        """How many pages of each cell can be sealed, host `[B, H]`; None if that is none."""
        if not self._fills_a_page(exact):
            return None
        pages = (exact.count - self.plan.format.residual).clamp_min(0) // PAGE
        if spared is None:
            return pages
        pages = pages.masked_fill(spared, 0)
        return pages if bool((pages > 0).any()) else None

    def _keep(self, exact: Block, capacity: int) -> None:
        """Make `exact` the tail: in the page that it will become, or in storage of its own."""
        self.open = (
            self.pool.grow_page() if self.plan.fills_pages and exact.size is not None else None
        )
        run = None if self.open is None else self.open.with_next_page()
        if run is None:
            self.tail = exact.owned(capacity)
            return
        start = (run.pages - 1) * PAGE
        keys, values = run.slot["keys"][:, :, start:], run.slot["values"][:, :, start:]
        keys[:, :, : exact.longest] = exact.keys[:, :, : exact.longest]
        values[:, :, : exact.longest] = exact.values[:, :, : exact.longest]
        self.tail = Block(keys, values, exact.count)

    def _page_limit(self, capacity: Tensor) -> Tensor | None:
        if not self.plan.bounded:
            return None
        if self.plan.pools:  # whichever head grows: nothing in reserve
            return torch.zeros_like(capacity)
        peak = self.plan.recipe.schedule.peak(capacity)
        full_tail = PAGE + self.plan.format.residual
        return (peak - self.plan.sinks - full_tail).clamp_min(0) // PAGE

    def _unrotated(self, keys: Tensor, exact: Block, n: int) -> Tensor:
        assert self.plan.rope is not None
        return self.plan.rope.unrotate(keys, exact.meta["positions"][:, :, :n]).to(keys.dtype)

    def reclaim(self) -> None:
        """Compact once whole dead pages amount to half a page per head, or metadata goes to waste."""
        cells = self.pool.pages.numel()
        wasteful = self.pool.idle_meta_pages() > CellCost.IDLE_META_PAGES
        if wasteful or self.pool.reclaimable() >= max(1, cells // 2):
            compact(self.pool)
            self.counters.compactions += 1

    def _seal(self, pending: Block, pages: Tensor, limit: Tensor | None, forward: Forward) -> None:
        if pending is self.tail and self.open is not None:  # one page, full, and where it belongs
            self.pool.close_page()
            self.counters.sealed += pages.numel() * PAGE
            self._keep(pending.empty(), 0)
            return
        n = int(pages.max()) * PAGE
        block = pending.each(lambda x: x[:, :, :n], pages * PAGE)
        if self.plan.pre_rope:
            block = Block(
                self._unrotated(block.keys, block, n), block.values, block.count, block.meta
            )
        self.pool.seal(block, pages, limit)
        # what is sealed is no longer exact; nothing can be taken back once some of it is gone
        if not self.plan.format.in_place and int(self.since.min()) > 0:
            kept = self.tail.count - 1 if forward.in_tail else self.tail.count
            self.sealing = Sealing(forward.tokens, self.tail.shrunk(kept), pages * PAGE)
        self.counters.sealed += int(pages.sum()) * PAGE
        if self.plan.evicts:
            self.reclaim()
        rest = pending.span(pages * PAGE, pending.count - pages * PAGE)
        self._keep(rest, max(rest.longest, GRANULE))

    # -- rows and length -------------------------------------------------------------------------

    def rows(self, index: Tensor) -> None:
        """Select rows (beam search, batch selection); pages are shared, not copied."""
        host = index.to("cpu")
        if torch.equal(host, torch.arange(len(self.seen))):
            return
        if len(host) != len(self.seen):
            fit.check_rows(self.plan, len(host))
        self.settled()
        self.tail, self.open = self.tail.rows(index), None
        self.sinks = self.sinks.rows(index) if self.sinks is not None else None
        self.centroids = self.centroids.rows(index) if self.centroids is not None else None
        self.seen, self.since = self.seen[host], self.since[host]
        self._one_each = torch.ones_like(self.seen)
        self._one_slot = torch.ones_like(self.tail.count)
        self.next_position = self.next_position.index_select(0, index.to(self.device))
        for memory in (self.memory, self.merger_memory):
            memory.update({n: x.index_select(0, index.to(x.device)) for n, x in memory.items()})
        capacity = self._capacity
        stale = capacity is None or (self.plan.shared_out and len(capacity) != len(host))
        self._capacity = None if stale or capacity is None else capacity[host]
        self._capacity_at, self._unpaged.of = self._capacity_at[host], None
        self.pool.rows(index)
        if self.tail.size is not None and self.tail.capacity > self.tail.size + GRANULE:
            self.tail = self.tail.owned(self.tail.size)  # the longest rows are gone
        self.tail.pack()

    def settled(self) -> None:
        """The forward has ended in every layer: nobody will want it taken back."""
        self.sealing = None

    def check_drop(self, n: int) -> None:
        """Raise RuntimeError if some of the newest `n` tokens may be gone already, or the format's
        statistics have gone on since in a way that cannot be taken back.
        """
        if n > int(self.since.min()):
            raise RuntimeError(
                f"cannot remove the newest {n} tokens: the cache was compressed "
                f"{int(self.since.min())} tokens ago; copy it before the turn, or crop less"
            )
        _, sealed, _ = self._parting(n)
        if not self.pool.can_drop(sealed):
            raise RuntimeError(
                f"cannot remove the newest {n} tokens: the format's statistics followed some of them, "
                "and what they were is known for the last sealing as a whole only; copy the cache "
                f"before the turn, or crop at most {int(self.tail.count.min())}"
            )

    def _parting(self, n: int) -> tuple[Block, Tensor, Tensor]:
        """The tail without the newest `n` tokens; and how many of them are in pages and sinks, `[B, H]`.

        If that is what the last commit brought, entries that it sealed are exact again.
        """
        last, held = self.sealing, self.tail.count
        if last is not None and bool((last.tokens == n).all()):
            return last.tail, last.entries, n - (held + last.entries - last.tail.count)
        left = torch.full_like(held, n)
        from_tail = torch.minimum(left, held)
        from_pages = torch.minimum(left - from_tail, self.pool.live)
        return self.tail.shrunk(held - from_tail), from_pages, left - from_tail - from_pages

    def drop_newest(self, n: int) -> None:
        """Forget the newest `n` tokens of every row.

        Raises RuntimeError, before anything is changed, if some of them may be gone already.
        """
        self.check_drop(n)
        self.tail, from_pages, from_sinks = self._parting(n)
        self.sealing = None
        if bool((from_pages > 0).any()):
            if self.open is not None:  # its next page will be another one
                self.tail, self.open = self.tail.empty(), None
            self.pool.drop_newest(from_pages)
            if not self.plan.base_positions:  # there, a page's first position must stay first
                self.reclaim()
        if self.sinks is not None:
            self.sinks = self.sinks.shrunk(self.sinks.count - from_sinks)
        if self.plan.recipe.scorer is not None:
            self.memory = self.plan.recipe.scorer.forget(self.memory, n)
        if self.plan.merger is not None:
            self.merger_memory = self.plan.merger.forget(self.merger_memory, n)
        self.seen, self.since = self.seen - n, self.since - n
        self.tail.pack()

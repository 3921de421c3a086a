"""A layer's pages and exact tiers as the C++ kernels see them: read where they lie, in one call."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom.core.format import PAGE
from kvloom.kernels import cpu_backend, library, ops
from kvloom.kernels.layout import cast

if TYPE_CHECKING:
    from kvloom.core.attend import Call, Partial, Tier
    from kvloom.core.block import Block
    from kvloom.core.slab import Slab
    from kvloom.core.store import LayerStore

LOG2E = 1.4426950408889634
UNSEEN = -1e30  # the kernels' logit of what must not be seen


class Native:
    """What the kernels know of one `LayerStore`; made anew whenever its slabs have changed."""

    def __init__(self) -> None:
        self.handle: Any = None
        # whose addresses the kernels have; not kept alive by that: freed memory is free
        self.known: list[tuple[weakref.ref[Slab], int]] = []
        self.shape = (0, 0)  # rows, query heads per KV head
        self.checked: tuple[str | None, str | None] | None = None  # see `why_unread`
        self.raw: Tensor | None = None  # logits of pages and tail `[B, H, G, Q, slots]`, for `mass`

    def __deepcopy__(self, memo: object) -> Native:
        return Native()  # addresses are not those of the copy

    def attend(
        self,
        store: LayerStore,
        call: Call,
        centroids: Tier | None = None,
        sink_logits: Tensor | None = None,
    ) -> Partial:
        """`(out, lse)` of pages, tail, sinks and `centroids`; with `sink_logits [H, G]` of a model, they
        are what `reference.combine` makes of it.
        """
        B, H, G, Q, _ = call.query.shape
        self._tell(store, G)
        raw, sealed = None, 0
        if store.plan.observes:
            sealed = sum(slab.pages for slab in store.pool.slabs) * PAGE
            slots = sealed + store.tail.longest
            raw = torch.full((B, H, G, Q, slots), UNSEEN, dtype=torch.float32, device="cpu")
        held = self._runs(store, centroids, sealed)
        self.handle.scale, self.handle.softcap = call.scale, call.softcap or 0.0
        if torch.compiler.is_compiling() and raw is None and sink_logits is None:
            layer = library.name(self.handle)
            out, lse = library.paged_attention(call.query, layer, store.plan.value_dim)
        else:
            width = store.plan.value_dim
            out, lse = cpu_backend.attend(self.handle, call.query, width, raw, sink_logits)
        del held
        self.raw = raw
        return out, lse

    def mass(self, store: LayerStore, call: Call, lse: Tensor) -> Tensor:
        """What the entries of pages and tail received in the last `attend`, `[B, H, slots]`; `lse [B, H, G,
        Q]` is that of all tiers. No key is read again.
        """
        assert self.raw is not None
        B, H, _, Q = lse.shape  # rejected drafts are gone from it
        raw, self.raw = self.raw[:, :, :, :Q].contiguous(), None
        norm = (lse.float() * LOG2E).clamp_min(UNSEEN / 10)
        if call.voters is not None:
            norm = norm.masked_fill(~call.voters[:, None, None], float("inf"))
        norm = norm.contiguous()
        slots = raw.shape[4]
        received = torch.empty(B, H, slots, dtype=torch.float32, device="cpu")
        self.handle.mass(
            raw.data_ptr(), slots, Q, norm.data_ptr(), slots, received.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return received

    def read_all(self, store: LayerStore) -> tuple[Tensor, Tensor]:
        """Keys (before rotation, if pages hold them so) and values of all slabs in the basis of the pages,
        `[B, H, slots, W]` in the model's dtype; zeros where a (row, head) has fewer pages.
        """
        self._tell(store, self.shape[1] or store.plan.group)
        plan, slabs = store.plan, store.pool.slabs
        total = sum(slab.pages for slab in slabs) * PAGE
        keys, values = (
            torch.empty(*store.tail.count.shape, total, width, dtype=torch.float32, device="cpu")
            for width in (plan.key_dim, plan.value_dim)
        )
        start, threads = 0, torch.get_num_threads()
        for i, slab in enumerate(slabs):
            slots = slab.pages * PAGE
            at = (x[:, :, start:].data_ptr() for x in (keys, values))
            self.handle.decode(i, slots, total, *at, threads)
            start += slots
        return cast(keys, plan.dtype), cast(values, plan.dtype)

    # -- what the kernels are told -----------------------------------------------------------------

    def _tell(self, store: LayerStore, group: int) -> None:
        shape = len(store.seen), group
        if self.handle is None or self.shape != shape:
            self.shape, self.known = shape, []
            self._begin(store)
        self._refresh(store)

    def _begin(self, store: LayerStore) -> None:
        plan, (B, G) = store.plan, self.shape
        compiled = cpu_backend.loaded()
        handle = compiled.Handle(B, plan.heads, G, plan.key_dim, plan.value_dim, cpu_backend.isa())
        handle.mode = cpu_backend.mode()
        if plan.pre_rope or plan.in_cache:
            assert plan.rope is not None
            interleaved, frequencies = plan.rope.pairing == "interleaved", plan.rope.inv_freq
            handle.rotate(frequencies.float().tolist(), interleaved, plan.rope.scale, plan.pre_rope)
        turned = plan.format.turned_by(store.pool.tables)
        if turned:  # the matrices are kept by the format, the signs by the pool
            key, signs = turned.get("key", (None, None))
            value, value_signs = turned.get("value", (None, None))
            handle.turn(_at(key), _at(signs), _at(value), _at(value_signs))
        self.handle = handle
        runs = [compiled.Run() for _ in range(3)]  # tail, sinks, centroids
        for run in runs:
            run.keys, run.values = (
                cpu_backend.dense(x) for x in (store.tail.keys, store.tail.values)
            )
            run.n = 0
        handle.runs = runs

    def _runs(self, store: LayerStore, centroids: Tier | None, sealed: int) -> list[Tensor]:
        """Tell the kernels about the exact tiers; returns what must live until they are read. The tail's
        logits are kept behind those of the `sealed` slots.
        """
        tail, sinks = store.tail, store.sinks
        held = self._run(0, tail.keys, tail.values, tail.longest, tail, raw=sealed)
        if sinks is not None and sinks.longest:
            back = store.sink_gap().contiguous() if store.plan.in_cache else None
            held += self._run(1, sinks.keys, sinks.values, sinks.longest, sinks, back=back)
        if store.centroids is not None:
            if centroids is None:
                self._run(2, tail.keys, tail.values, 0)
            else:
                keys, values = centroids.keys, centroids.values
                held += self._run(2, keys, values, keys.shape[2], bias=centroids.bias)
        return held

    def _run(
        self,
        i: int,
        keys: Tensor,
        values: Tensor,
        n: int,
        block: Block | None = None,
        bias: Tensor | None = None,
        back: Tensor | None = None,
        raw: int = -1,
    ) -> list[Tensor]:
        held = [keys, values]
        count = None
        if block is not None and n:
            count = block.count.contiguous() if block.size is None else None
            bias = block.meta.get("mass")
        if bias is not None:
            bias = bias.float().contiguous()
        held += [x for x in (count, bias, back) if x is not None]
        self.handle.set_run(
            i, keys.data_ptr(), values.data_ptr(), n, _start(count), _start(bias),
            0 if bias is None else bias.shape[2], _start(back), raw,
            *keys.stride()[:3], *values.stride()[:3],
        )  # fmt: skip
        return held

    def _refresh(self, store: LayerStore) -> None:
        slabs, known = store.pool.slabs, self.known
        if len(slabs) == len(known) and all(
            ref() is slab and version == slab.version
            for (ref, version), slab in zip(known, slabs, strict=True)
        ):
            return
        self.handle.slabs = [self._slab(store, slab) for slab in slabs]
        self.known = [(weakref.ref(slab), slab.version) for slab in slabs]

    def _slab(self, store: LayerStore, slab: Slab) -> Any:
        made = cpu_backend.loaded().Slab()
        fields = cpu_backend.Fields(slab.tile, slab.slot, slab.sets, slab.index, store.pool.tables)
        parts = store.plan.format.packed(store.plan.key_dim, store.plan.value_dim)
        assert parts is not None
        for name, part in zip(("keys", "values"), parts, strict=True):
            if part is None:
                setattr(made, f"dense_{name}", cpu_backend.dense(slab.slot[name]))
            else:
                setattr(made, name, cpu_backend.packed(part, fields))
        made.first = cpu_backend.address(slab.first, torch.int64)
        made.used = cpu_backend.address(slab.used, torch.int64)
        made.skip = cpu_backend.address(slab.skip, torch.int64)
        made.extent = slab.pages * PAGE
        if slab.alive is not None:
            made.alive, made.alive_stride = cpu_backend.address(slab.alive), slab.alive.shape[2]
        if "mass" in slab.meta:
            mass = slab.meta["mass"]
            made.mass, made.mass_stride = cpu_backend.address(mass, torch.float32), mass.shape[2]
        if store.plan.pre_rope:
            self._positions(slab, made)
        return made

    def _positions(self, slab: Slab, made: Any) -> None:
        if slab.base is not None:
            made.base = cpu_backend.address(slab.base, torch.int32)
            made.base_stride = slab.base.shape[2]
            last = int(slab.base.max()) + PAGE
        else:
            at = slab.meta["positions"]
            made.positions = cpu_backend.address(at, torch.int32)
            made.position_stride, last = at.shape[2], int(at.max())
        self.handle.reach(last)


def _start(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else cpu_backend.address(x)


def why_not(store: LayerStore, call: Call) -> str | None:
    """The reason why the kernels cannot attend over the pages and the tail, or None."""
    if call.query.shape[3] > cpu_backend.QUERIES:
        return f"{call.query.shape[3]} queries at once: matrix products are faster"
    if call.past_mask is not None:
        return "a mask addresses columns of the past"
    return why_unread(store)


def why_unread(store: LayerStore) -> str | None:
    """The reason why the kernels cannot read the pages, or None; found once for every store."""
    asked, native = ops.forced_backend(), store.native
    if native.checked is None or native.checked[0] != asked:
        native.checked = asked, _why_unread(store)
    return native.checked[1]


def _why_unread(store: LayerStore) -> str | None:
    plan = store.plan
    widest = max(plan.key_dim, plan.value_dim)
    reason = ops.cpu_why_not(store.device, plan.dtype, widest)
    if reason is None and plan.format.packed(plan.key_dim, plan.value_dim) is None:
        return f"{plan.format} does not say how its pages lie in memory"
    return reason

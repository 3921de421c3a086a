"""The engine of `mp_kvm`: online clustering of evicted tokens, all rows and heads at once.

A cell is what is clustered by itself: one KV head of one row, or one row where the heads share their
clusters. Every cell has the same number of slots, some of them in use; a token that opens a centroid
takes the first free slot, and a merged pair stays in the lower one. All decisions are masks, so that
nothing waits for a device until the number of centroids is read at the end of a fold; only where
centroids may wait to be merged, it is read once per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.core.block import Block, take_slots
from kvloom.core.merge import Losers, Memory
from kvloom.kernels import ops
from kvloom.policies.merge._counts import UNIT, counts_of

if TYPE_CHECKING:
    from kvloom.policies.merge.mp_kvm import MPKVM

HISTORY = 64  # batches whose similarities an adaptive threshold looks at
_NONE = float("-inf")


@dataclass
class Tokens:
    """Tokens to take in, by cell `[B, G]`.

    Attributes:
        content: `[B, G, n, W]` fp32, keys, values and position side by side.
        mass: `[B, G, n]`, tokens that each stands for. valid: bool `[B, G, n]`, left-aligned.
    """

    content: Tensor
    mass: Tensor
    valid: Tensor

    def part(self, start: int, stop: int) -> Tokens:
        """The tokens `start .. stop` of each cell."""
        return Tokens(*(x[:, :, start:stop] for x in (self.content, self.mass, self.valid)))


def memory_of(rules: MPKVM, rows: int, heads: int) -> Memory:
    """What is remembered of each cell: tokens ingested since the last reduction, and in all, and the
    best similarities of the latest batches (NaN: none).
    """
    cells = rows, heads if rules.per_head_clustering else 1
    memory: Memory = {}
    if rules.flush_interval:
        memory["since"] = torch.zeros(*cells, dtype=torch.int64)
    if rules.init_preserve_first_n is not None:
        memory["ingested"] = torch.zeros(*cells, dtype=torch.int64)
    if rules.adaptive_threshold:
        memory["best"] = torch.full((*cells, HISTORY, rules.block), math.nan)
    return memory


def ingest(rules: MPKVM, losers: Losers, held: Block, memory: Memory) -> tuple[Block, Memory]:
    """Centroids and memory after taking in the losers, block by block."""
    tokens = _tokens(rules, losers)
    n = tokens.valid.shape[2]
    if n == 0:
        return held, memory
    clusters = Clusters(rules, held, memory, min(rules.block, n))
    for start in range(0, n, rules.block):
        clusters.take(tokens.part(start, start + rules.block))
    return clusters.close(held), clusters.memory


def takes(rules: MPKVM, losers: Losers) -> Tensor | None:
    """Which losers are taken in: bool `[B, H, N]`; None: all."""
    if rules.sample_stride == 1:
        return None
    return losers.valid & (losers.positions % rules.sample_stride == 0)


def _tokens(rules: MPKVM, losers: Losers) -> Tokens:
    valid, mass = losers.valid, torch.exp(losers.mass)
    content = _content(rules, losers.keys, losers.values, losers.positions)
    taken = takes(rules, losers)
    if taken is not None:
        valid = taken
    if not rules.per_head_clustering:
        valid, mass = valid[:, :1], mass[:, :1]
    if taken is not None:  # without gaps, so that blocks are counted over what is taken in
        order = torch.argsort(~valid, dim=-1, stable=True)
        content, mass, valid = (take_slots(x, order) for x in (content, mass, valid))
    content = content.masked_fill(~valid[..., None], 0.0)  # else weight 0 times infinity
    return Tokens(content, mass.masked_fill(~valid, 0.0), valid)


def _content(rules: MPKVM, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """`[B, G, n, W]` fp32: with shared clusters, the keys of all heads, then their values."""
    parts = [keys.float(), values.float(), positions.float()[..., None]]
    if not rules.per_head_clustering:
        parts = [x.transpose(1, 2).flatten(2)[:, None] for x in parts[:2]] + [parts[2][:, :1]]
    return torch.cat(parts, -1)


class Clusters:
    """The centroids of all cells while they take in a fold.

    Attributes:
        slots: `[M, N, R]` fp32, M = B G cells of N slots, of which the last is never used. Of R columns
            the first W are the content as in `Tokens`, then comes the mass, then what is compared.
        gone: `[M, N]`, 0 where a slot is in use, else -inf.
        alike: `[M, N, N]`, similarities of all pairs in units (-inf: not a pair), made when they are
            first needed, and then kept up to date row by row.
    """

    def __init__(self, rules: MPKVM, held: Block, memory: Memory, block: int):
        self.rules, self.memory = rules, dict(memory)
        self.heads, self.width = held.keys.shape[1], held.keys.shape[3]
        content = _content(rules, held.keys, held.values, held.meta["positions"])
        mass, used = counts_of(held.meta["mass"]), held.valid(held.keys.shape[2])
        if not rules.per_head_clustering:
            mass, used = mass[:, :1], used[:, :1]
        self.cells = content.shape[:2]
        content, mass, used = (x.flatten(0, 1) for x in (content, mass, used))
        self.columns = content.shape[2]
        self.slots = pad(self._slot(content, mass[..., None]), (0, 0, 0, block + 1))
        self.flat = self.slots.flatten(0, 1)  # a view, as the next
        self.probe = self.slots[..., self.columns + 1 :]
        self.probes = self.probe.transpose(1, 2)
        self.gone = torch.zeros_like(mass).masked_fill(~used, _NONE)
        self.gone = pad(self.gone, (0, block + 1), value=_NONE)
        self.start = torch.arange(len(mass), device=mass.device) * self.gone.shape[1]
        self.never = torch.full_like(self.start, self.gone.shape[1] - 1)
        self.alike: Tensor | None = None
        self.most = held.longest  # no cell has more centroids than that
        self.reads = reading_is_free(mass.device)

    def _slot(self, content: Tensor, mass: Tensor) -> Tensor:
        """Columns of slots with this content `[..., W]` and mass `[..., 1]`."""
        shared = not self.rules.per_head_clustering
        probe = content[..., : self.width * (self.heads if shared else 1)]
        if shared and self.rules.head_mean:
            probe = probe.unflatten(-1, (self.heads, self.width)).mean(-2)
        if self.rules.metric == "cosine":  # so that products come in units
            length = torch.linalg.vector_norm(probe, dim=-1, keepdim=True)
            probe = probe * (math.sqrt(UNIT) / length.clamp_min(1e-30))
        else:
            probe = probe * UNIT
        return torch.cat([content, mass, probe], -1)

    def _similar(self, slots: Tensor) -> Tensor:
        """Similarities of `[M, m, R]` to what is in use, `[M, m, N]`, in whole units."""
        probe = slots[..., self.columns + 1 :]
        if self.rules.metric == "cosine":
            similarity = torch.bmm(probe, self.probes)
        else:  # differences first: squares and products would cancel for near neighbours
            mode = "donot_use_mm_for_euclid_dist"
            similarity = UNIT - torch.cdist(probe, self.probe, compute_mode=mode)
        return similarity.round_().add_(self.gone[:, None])

    def _at(self, slots: Tensor) -> Tensor:
        """Slots `[M, m]` counted over all cells, `[M m]`."""
        return (self.start[:, None] + slots).view(-1)

    def _write(self, slots: Tensor, rows: Tensor) -> None:
        """Put `[M, m, R]` into `slots [M, m]`; the similarities follow."""
        at = self._at(slots)
        self.flat.index_copy_(0, at, rows.flatten(0, 1))
        if self.alike is None:
            return
        similar = self._similar(rows)
        similar.add_(self.gone.view(-1).index_select(0, at).view(*slots.shape, 1))
        similar.scatter_(2, slots[..., None], _NONE)  # no pair with itself
        self.alike.view(-1, self.alike.shape[2]).index_copy_(0, at, similar.flatten(0, 1))
        columns = similar.transpose(1, 2)
        self.alike.scatter_(2, slots[:, None].expand_as(columns), columns)

    # -- one block -------------------------------------------------------------------------------

    def take(self, tokens: Tokens) -> None:
        """Fold a block: some join centroids, the others open new ones, of which pairs may merge."""
        content, mass, valid = (
            x.flatten(0, 1) for x in (tokens.content, tokens.mass, tokens.valid)
        )
        rows = self._slot(content, mass[..., None])
        best, near = self._similar(rows).max(-1)
        joins = valid & (best >= self._threshold(best, valid))
        if self.rules.init_preserve_first_n is not None:
            joins &= ~self._early(valid, self.rules.init_preserve_first_n)
        opens = valid & ~joins
        if not self.reads or bool(joins.any()):
            self._join(rows, near, joins)
        if not self.reads or bool(opens.any()):
            self._open(rows, opens)
        self._reduce(valid)

    def _threshold(self, best: Tensor, valid: Tensor) -> Tensor | float:
        """What a similarity must reach, in units; `[M, 1]` if it adapts to the latest batches, this
        one included.
        """
        if not self.rules.adaptive_threshold:
            return self.rules.similarity_threshold * UNIT
        history = self.memory["best"].flatten(0, 1)
        found = valid & (best > _NONE)
        batch = (best / UNIT).masked_fill(~found, math.nan)
        batch = pad(batch, (0, history.shape[2] - batch.shape[1]), value=math.nan)
        longer = torch.cat([history[:, 1:], batch[:, None]], 1)
        history = torch.where(found.any(-1)[:, None, None], longer, history)
        self.memory["best"] = history.unflatten(0, self.cells)
        quantile = torch.nanquantile(history.flatten(1), self.rules.threshold_quantile, dim=-1)
        return quantile.nan_to_num(self.rules.similarity_threshold)[:, None] * UNIT

    def _early(self, valid: Tensor, n: int) -> Tensor:
        """Whether tokens are among the first `n` that their cell ever took in."""
        before = self.memory["ingested"]
        self.memory["ingested"] = before + valid.sum(-1).view(self.cells)
        return before.view(-1, 1) + valid.cumsum(-1) <= n

    def _join(self, rows: Tensor, near: Tensor, joins: Tensor) -> None:
        """Fold tokens that join into the centroids at `near [M, b]`."""
        mass, ema = rows[..., self.columns] * joins, self.rules.ema
        at, smooth = self._at(near).view_as(near), self.rules.update == "ema"
        new = ops.join_centroids(self.flat, at, rows, mass, self.columns, ema if smooth else None)
        self._write(near, self._slot(new[..., :-1], new[..., -1:]))

    def _open(self, rows: Tensor, opens: Tensor) -> None:
        """Let tokens open centroids in the first free slots, in their order."""
        order = torch.argsort(~opens, dim=-1, stable=True)
        slots = torch.argsort(self.gone, dim=-1, stable=True)[:, : order.shape[1]]
        mine = opens.gather(1, order)
        self.gone.scatter_(
            1, slots, torch.zeros_like(mine, dtype=self.gone.dtype).masked_fill(~mine, _NONE)
        )
        self._write(slots, rows.gather(1, order[..., None].expand_as(rows)))

    # -- back to max_centroids -------------------------------------------------------------------

    def _reduce(self, valid: Tensor) -> None:
        """Merge pairs where a cell has too many centroids."""
        excess = (self.gone == 0).sum(-1) - self.rules.max_centroids
        if self.rules.flush_threshold:
            due = excess > self.rules.flush_threshold
            if self.rules.flush_interval:
                since = self.memory["since"].flatten() + valid.sum(-1)
                due = due | (since >= self.rules.flush_interval)
                self.memory["since"] = since.masked_fill(due, 0).view(self.cells)
            excess = excess.masked_fill(~due, 0)
        steps = self._steps(excess, valid.shape[1])
        if steps > 0 and self.alike is None:
            self.alike = self._similar(self.slots).add_(self.gone[..., None])
            self.alike.diagonal(dim1=1, dim2=2).fill_(_NONE)
        for i in range(steps):
            self._merge(excess > i)

    def _steps(self, excess: Tensor, block: int) -> int:
        """The most pairs that any cell must merge; where asking would mean waiting, a bound."""
        if self.reads or self.rules.flush_threshold:
            return int(excess.max())
        limit = self.rules.max_centroids
        self.most += block
        steps, self.most = self.most - limit, min(self.most, limit)
        return steps

    def _merge(self, due: Tensor) -> None:
        """One pair becomes one centroid in the cells that are `due [M]`."""
        assert self.alike is not None
        a, b = self._pair(self.alike)
        b = torch.where(due, b, self.never)  # the others take in nothing: its mass is 0
        empty = self.start + b
        one, two = self.flat.index_select(0, torch.cat([self.start + a, empty])).chunk(2)
        mass = two[:, self.columns, None]
        total = one[:, self.columns, None] + mass
        share = mass / total.clamp_min(1e-30)
        new = torch.lerp(one[:, : self.columns], two[:, : self.columns], share)
        self.gone.view(-1).index_fill_(0, empty, _NONE)
        self.alike.view(-1, self.alike.shape[2]).index_fill_(0, empty, _NONE)
        self.alike.scatter_(2, b[:, None, None].expand(-1, self.alike.shape[1], 1), _NONE)
        self._write(a[:, None], self._slot(new, total)[:, None])

    def _pair(self, alike: Tensor) -> tuple[Tensor, Tensor]:
        """The two most similar centroids, or the two lightest: slots `[M]`, the lower first."""
        top, a = alike.amax(-1).max(-1)
        b = alike.view(-1, alike.shape[2]).index_select(0, self.start + a).argmax(-1)
        least = self.rules.min_merge_similarity
        if least is None:
            return a, b
        mass = self.slots[..., self.columns] - self.gone
        light = mass.argmin(-1)
        next_ = mass.scatter(1, light[:, None], math.inf).argmin(-1)
        far = top < least * UNIT
        a, b = torch.where(far, light, a), torch.where(far, next_, b)
        return torch.minimum(a, b), torch.maximum(a, b)

    # -- the end ---------------------------------------------------------------------------------

    def close(self, held: Block) -> Block:
        """The centroids as a block like `held`; here the device is waited for, unless all slots were in use
        before, which stay so.
        """
        (B, H, room, _), values = held.keys.shape, held.values.shape[3]
        order = torch.argsort(self.gone, dim=-1, descending=True, stable=True)[:, :room]
        used = self.gone.gather(1, order) == 0
        kept = self.slots.gather(1, order[..., None].expand(-1, -1, self.columns + 1))
        kept = kept.masked_fill(~used[..., None], 0.0).unflatten(0, self.cells)
        heads = H // self.cells[1]  # of each cell
        parts = kept.split((heads * self.width, heads * values, 1, 1), -1)
        out = [torch.empty_like(x) for x in (held.keys, held.values, *[held.meta["mass"]] * 2)]
        for x, part in zip(out[:2], parts[:2], strict=True):
            x.copy_(part.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(1, 2))
        for x, part in zip(out[2:], parts[2:], strict=True):
            x.copy_(part[..., 0].expand(B, H, room))
        keys, content, positions, mass = out
        full = not self.rules.flush_threshold and held.size == self.rules.max_centroids
        count = held.count
        if not full:
            count = used.sum(-1).cpu().view(self.cells).expand(B, H).contiguous()
        return Block(keys, content, count, {"mass": mass.log_(), "positions": positions})


def reading_is_free(device: torch.device) -> bool:
    """Whether a number may be read without waiting for a device."""
    return device.type == "cpu"

"""The mask-only oracle: nothing is ever evicted, dead entries are masked, in naive Python loops.

It keeps every token of every layer, decides by brute force who lives, and fakes what a format does
by decoding what it encoded. It shares with kvloom only the methods under their own names
(`Scorer.arrive/observe/remember/score`, `Allocator.shares/split`, `PageFormat.encode/decode`,
`RopeSpec`), which have oracles of their own, and for budgets in bytes the capacities that the plan
reports, which the byte ceiling holds to account; selection, schedules, merging, sealing, tiles and
masks are written again.
"""

from __future__ import annotations

import math
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import eager_mask

from kvloom.core.budget import Budget
from kvloom.core.entries import Entries
from kvloom.core.format import Place
from kvloom.core.merge import CentroidMerger, Group, SurvivorMerger
from kvloom.core.plan import LayerPlan
from kvloom.core.policy import Allocator, Queries
from kvloom.core.recipe import Recipe
from kvloom.formats.dense import Dense
from kvloom.hf.output import output_weight_of
from kvloom.hf.rope import rope_of
from tests.formats.reading import Cell
from tests.oracle.mergers import Centroids, Folded, Survivors

NAME = "shadow_oracle"
NOISE = 1e-5  # scores that differ by less, relatively, may change places by fp32 rounding
REFRESH = 16  # a percentage is worked out again at multiples of this many tokens


class ShadowLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: ShadowCache, layer_idx: int, index: int):
        super().__init__()
        self.cache, self.layer_idx, self.index, self.columns = cache, layer_idx, index, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, H = key_states.shape[:2]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.real = torch.zeros(B, 0, dtype=torch.bool)
        self.positions = torch.zeros(B, 0, dtype=torch.long)
        self.alive = torch.zeros(B, H, 0, dtype=torch.bool)
        self.state: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {}
        self.unsealed = [[[] for _ in range(H)] for _ in range(B)]
        self.tile = [[{} for _ in range(H)] for _ in range(B)]
        self.folded = [[Folded() for _ in range(H)] for _ in range(B)]
        self.merged = [[Survivors(self.merger) for _ in range(H)] for _ in range(B)]
        self.since = [[0] * H for _ in range(B)]
        self.cells = self.readers(B, H)
        self.held: Tensor | None = None
        self.is_initialized = True

    def readers(self, B: int, H: int) -> list[list[Cell]]:
        """What each (row, head) reads of the pages it sealed."""
        fmt = self.cache.format
        if fmt is None:
            return []
        rope = self.rope if fmt.pre_rope or "rope" in fmt.needs else None
        widths = self.keys.shape[3], self.values.shape[3]
        place = Place(self.index, self.cache.compressed, H, *widths, rope)
        return [[Cell(fmt, place, h) for h in range(H)] for _ in range(B)]

    def update(self, key_states: Tensor, value_states: Tensor, *a: Any, **k: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.columns += key_states.shape[2]
        keys = self.keys.view_as(self.keys)
        keys.shadow = self
        return keys, self.values

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for name in ("keys", "values", "real", "positions", "alive"):
            setattr(self, name, getattr(self, name)[beam_idx])
        self.state = {n: x[beam_idx] for n, x in self.state.items()}
        self.memory = {n: x[beam_idx] for n, x in self.memory.items()}
        rows = beam_idx.tolist()
        self.held = None if self.held is None else self.held[beam_idx]
        self.unsealed = [[list(h) for h in self.unsealed[i]] for i in rows]
        self.tile = [[dict(h) for h in self.tile[i]] for i in rows]
        self.folded = [[h.copy() for h in self.folded[i]] for i in rows]
        self.merged = [[copy(h) for h in self.merged[i]] for i in rows]
        self.since = [list(self.since[i]) for i in rows]
        self.cells = [[copy(cell) for cell in self.cells[i]] for i in rows if self.cells]

    # -- what the methods see --------------------------------------------------------------------

    @cached_property
    def rope(self) -> Any:
        return rope_of(self.cache.model, self.layer_idx)

    def take_in(
        self, query: Tensor, real: Tensor, positions: Tensor, weights: Tensor, **logits: Any
    ) -> None:
        """`query` [B, H, G, new, D], `real` [B, new], `positions` [B, new], `weights`
        [B, H, G, new, T]; `logits` are the scale and the softcap.
        """
        recipe, B, new = self.cache.recipe, real.shape[0], real.shape[1]
        H, T = self.keys.shape[1], self.keys.shape[2]
        self.real = torch.cat([self.real, real], 1)
        self.positions = torch.cat([self.positions, positions], 1)
        self.alive = torch.cat([self.alive, real[:, None].expand(B, H, new)], 2)
        if recipe.scorer is not None:
            arrived = recipe.scorer.arrive(self.keys[:, :, T - new :], self.values[:, :, T - new :])
            for name, x in arrived.items():
                old = self.state.get(name, x[:, :, :0])
                self.state[name] = torch.cat([old, x], 2)
            mass = (weights * real[:, None, None, :, None]).sum((2, 3))
            names = recipe.scorer.state_names
            own = {name: self.state[name] for name in names}
            self.state.update(recipe.scorer.observe(own, {"attention_mass": mass}))
            self.remember(query, real, positions)
        for name in () if self.merger is None else self.merger.state_names:
            zero = torch.zeros(B, H, new)
            self.state[name] = torch.cat([self.state.get(name, zero[:, :, :0]), zero], 2)
        for b, row in enumerate(self.real.tolist()):
            pinned = self.pinned(b)
            fresh = [j for j in range(T - new, T) if row[j] and j not in pinned]
            for h in range(H):
                self.unsealed[b][h] += fresh
        if recipe.evicts:
            self.evict(real.sum(1).tolist(), logits)
        for b in range(B):
            for h in range(H):
                self.seal(b, h)

    @property
    def merger(self) -> Any:
        merger = self.cache.recipe.merger
        return merger if merger is not None and merger.serves(self.index) else None

    def remember(self, query: Tensor, real: Tensor, positions: Tensor) -> None:
        needs = self.cache.recipe.scorer.needs
        queries = Queries(query, positions, real)
        if "pre_rope_queries" in needs:
            queries = Queries(self.rope.unrotate(query, positions[:, None, None]), positions, real)
        if needs & {"queries", "pre_rope_queries"}:
            self.memory = self.cache.recipe.scorer.remember(self.memory, queries)
        if self.merger is not None and "queries" in self.merger.needs:
            for b, row in enumerate(self.merged):
                for h, head in enumerate(row):
                    seen = Queries(
                        query[b : b + 1, h : h + 1], positions[b : b + 1], real[b : b + 1]
                    )
                    head.memory = self.merger.remember(head.memory, seen)

    def pinned(self, b: int) -> set[int]:
        sinks = self.cache.sinks
        return set(self.real[b].nonzero().flatten().tolist()[:sinks])

    def spread(self) -> Tensor:
        """Position of every entry of every head."""
        return self.positions[:, None].expand(self.alive.shape)

    def scores(self, logits: dict[str, Any], due: list[list[int] | None]) -> Tensor:
        """The scorer's own opinion, on the full cache: the dead are not valid, but in the way."""
        B, H = self.alive.shape[:2]
        target = torch.zeros(B, H, dtype=torch.int64)
        for b, goals in enumerate(due):
            sinks = len(self.pinned(b))
            if goals is not None:
                even = [(goals[0] - H * sinks) // H] * H
                target[b] = torch.tensor(even if self.pools else [goal - sinks for goal in goals])
        valid, scorer = self.alive.clone(), self.cache.recipe.scorer
        for b in range(valid.shape[0]):
            for j in self.pinned(b):
                valid[b, :, j] = False
        weight = None
        if "output_weight" in scorer.needs:
            H, E = self.values.shape[1], self.values.shape[3]
            weight = output_weight_of(self.cache.model, self.layer_idx, H, E)
        entries = Entries(
            valid,
            {**self.state, "positions": self.spread()},
            lambda: self.keys,
            lambda: self.values,
            lambda: self.rope.unrotate(self.keys, self.spread()),
            layer=self.index,
            layers=self.cache.compressed,
            memory=self.memory,
            output_weight=weight,
            target=target,
            rope=self.rope if "pre_rope_queries" in scorer.needs else None,
            **logits,
        )
        return scorer.score(entries).float()

    # -- how many may stay -----------------------------------------------------------------------

    def capacities(self) -> list[list[int]]:
        """C of every row and head."""
        (B, H), recipe, budget = self.alive.shape[:2], self.cache.recipe, self.cache.budget
        seen = self.real.sum(1)
        if budget is None or budget.kind == "tokens":
            entries = recipe.scorer.capacity if budget is None else int(budget.amount)
            if budget is not None and self.merger is not None:
                entries -= self.merger.centroids
            sinks, shares = self.cache.sinks, (recipe.allocator or Allocator()).shares
            row = [
                max(sinks + 1, sinks + math.floor((entries - sinks) * share))
                for share in shares(self.cache.compressed, H)[self.index].tolist()
            ]
            return [row] * B
        step = REFRESH if budget.kind == "share" else 1
        fresh = self.plan.capacity(seen // step * step)
        self.held = fresh if self.held is None else torch.maximum(fresh, self.held)
        return self.held.tolist()

    @cached_property
    def plan(self) -> LayerPlan:
        """kvloom's own, for its budgets in bytes."""
        cache, H = self.cache, self.alive.shape[1]
        heads = cache.model.config.get_text_config(decoder=True).num_attention_heads
        return LayerPlan(
            cache.recipe, cache.budget, cache.format or Dense(), self.index, cache.compressed, H,
            self.keys.shape[3], self.values.shape[3], self.keys.dtype, group=heads // H,
            other_elements=2 * H * self.keys.shape[3] * cache.windows,
        )  # fmt: skip

    def goal(self, length: int, capacity: int, b: int, new: int, since: int, cells: int = 1) -> int:
        """Entries to keep of `length`, for `cells` heads together; `length` if nothing is due."""
        schedule = self.cache.recipe.schedule
        every, slack = schedule.every * cells, schedule.slack * cells
        drop, over = schedule.max_drop * cells or 10**9, length - capacity
        seen = int(self.real[b].sum())
        if schedule.rule == "paper":
            passed = sum(t % schedule.every == 0 for t in range(seen - new + 1, seen + 1))
            return length - min(over, drop * passed) if over > slack and passed else length
        if every == 0 or over < max(every, 1):
            return length
        if schedule.rule == "final":
            if since < schedule.every:
                return length
            slack -= every - cells
            return max(capacity, min(length - drop, capacity + slack))
        return max(capacity, min(length - drop, capacity + slack))

    # -- who stays -------------------------------------------------------------------------------

    def evict(self, new: list[int], logits: dict[str, Any]) -> None:
        """`new`: valid tokens of this forward, per row."""
        capacities, alive, scores = self.capacities(), self.alive.tolist(), None
        lives = [[[j for j, live in enumerate(head) if live] for head in row] for row in alive]
        due = []
        for b, live in enumerate(lives):
            self.since[b] = [n + new[b] for n in self.since[b]]
            due.append(self.goals([len(head) for head in live], capacities[b], b, new[b]))
        for b, (live, goals) in enumerate(zip(lives, due, strict=True)):
            pinned, lost = self.pinned(b), []
            if goals is None:
                continue
            lengths = [len(head) for head in live]
            for h, (n, goal) in enumerate(zip(lengths, goals * len(live), strict=False)):
                self.since[b][h] = 0 if self.pools or goal != n else self.since[b][h]
            scores = self.scores(logits, due).tolist() if scores is None else scores
            free = [[j for j in head if j not in pinned] for head in live]
            values = [
                self.ranked(b, h, free[h], scores[b][h], self.protected(capacities[b], goals, b, h))
                for h in range(len(free))
            ]
            targets = self.targets(goals, values, capacities[b], len(pinned))
            for h, target in enumerate(targets):
                keep = self.chosen(b, h, values[h], target)
                lost.append([j for j in free[h] if j not in keep])
                self.merge(b, h, sorted(keep), lost[h], scores[b][h], logits)
                self.alive[b, h, lost[h]] = False
                self.unsealed[b][h] = [j for j in self.unsealed[b][h] if j in keep]
            self.fold(b, lost)

    @property
    def pools(self) -> bool:
        """Whether the heads of a layer share one budget."""
        allocator = self.cache.recipe.allocator
        return allocator is not None and allocator.pools

    def goals(self, lengths: list[int], capacity: list[int], b: int, new: int) -> list[int] | None:
        """Entries to keep per head, or of all heads together; None if nothing is due."""
        if self.pools:
            since = min(self.since[b])
            total = self.goal(sum(lengths), sum(capacity), b, new, since, len(lengths))
            return None if total == sum(lengths) else [total]
        heads = zip(lengths, capacity, self.since[b], strict=True)
        goals = [self.goal(n, c, b, new, since) for n, c, since in heads]
        return None if goals == lengths else goals

    def protected(self, capacity: list[int], goals: list[int], b: int, h: int) -> int:
        """How many of the newest always stay: at most what the head gets."""
        pinned, H = len(self.pinned(b)), len(capacity)
        wanted = int(self.cache.recipe.scorer.protected(torch.tensor([[capacity[h] - pinned]])))
        mine = (goals[0] - H * pinned) // H if self.pools else goals[h] - pinned
        return min(wanted, mine)

    def targets(
        self, goals: list[int], values: list[dict[int, float]], capacity: list[int], pinned: int
    ) -> list[int]:
        """Entries to keep per head, pinned ones aside."""
        if not self.pools:
            return [goal - pinned for goal in goals]
        H, T = len(values), self.alive.shape[2]
        ranked = torch.full((1, H, T), -math.inf)
        for h, value in enumerate(values):
            for j, x in value.items():
                ranked[0, h, j] = x
        total = goals[0] - H * pinned
        while True:
            split = self.cache.recipe.allocator.split(
                ranked, ranked > -math.inf, torch.tensor([total])
            )
            self.cache.close_calls += contested(values, split[0].tolist())
            if self.cache.budget is None or self.cache.budget.kind == "tokens":
                return split[0].tolist()
            # unequal heads cost more bytes than equal ones, so the sum shrinks until they fit
            peaks, widest = self.cache.recipe.schedule.peak(split[0] + pinned), 0
            if self.cache.budget.kind == "bytes":  # other rows may be as wide as any can become
                peak = self.cache.recipe.schedule.peak(torch.tensor([capacity]))
                widest = int(self.cache.recipe.allocator.largest(peak))
            caps = torch.tensor([capacity])
            paged = not bool(self.plan.unpaged_cells(caps).all())
            if self.plan.cost.nbytes(peaks, widest=widest, paged=paged) <= self.plan.ceiling(caps):
                return split[0].tolist()
            total -= max(1, total // 32)

    def tiles(self, b: int, h: int, entries: list[int]) -> list[list[int]]:
        """Those that can only go together."""
        together: dict[int, list[int]] = {}
        if self.cache.format is not None and not self.cache.format.movable:
            for j in entries:
                if j in self.tile[b][h]:
                    together.setdefault(self.tile[b][h][j], []).append(j)
        return list(together.values())

    def ranked(
        self, b: int, h: int, free: list[int], scores: list[float], protected: int
    ) -> dict[int, float]:
        """What each entry is worth: the newest everything, the members of a tile their mean."""
        value = {j: scores[j] for j in free}
        for j in free[len(free) - protected :] if protected > 0 else []:
            value[j] = math.inf
        for members in self.tiles(b, h, free):
            mean = sum(value[j] for j in members) / len(members)
            for j in members:
                value[j] = mean
        return value

    def chosen(self, b: int, h: int, value: dict[int, float], target: int) -> set[int]:
        """Sort everything by (score, newness), take the best; a tile that does not fit goes."""
        ranked = sorted(value, key=lambda j: (-value[j], -j))
        keep = set(ranked[:target])
        if 0 < target < len(ranked):
            last, first = value[ranked[target - 1]], value[ranked[target]]
            self.cache.close_calls += 0 < last - first < NOISE * abs(first)
        for members in self.tiles(b, h, list(value)):
            if not keep.issuperset(members):
                keep -= set(members)
        return keep

    # -- what becomes of them --------------------------------------------------------------------

    def fold(self, b: int, lost: list[list[int]]) -> None:
        """Hand the evicted to the merger's oracle, as they are stored at this moment."""
        if not isinstance(self.merger, CentroidMerger):
            return
        for h, gone in enumerate(lost):
            positions, keys = self.positions[b, gone], self.keys[b, h, gone].float()
            if not self.merger.rotated:
                keys = self.rope.unrotate(keys, positions)
            self.folded[b][h].take(keys, self.values[b, h, gone].float(), positions)

    def merge(
        self, b: int, h: int, keep: list[int], gone: list[int], scores: list[float], logits: Any
    ) -> None:
        """Let the survivors of one head take in what leaves it."""
        if not isinstance(self.merger, SurvivorMerger) or not gone:
            return
        fmt = self.cache.format
        in_place = fmt is None or fmt.in_place
        open_ = {j for j in keep if in_place or j in self.unsealed[b][h]}
        here = sorted([*keep, *gone])
        state = {name: self.state[name][b, h, here] for name in self.merger.state_names}
        group = Group(
            self.keys[b, h, here][None, None].float(), self.values[b, h, here][None, None].float(),
            mask_of(here, gone), mask_of(here, keep), mask_of(here, open_),
            {name: x[None, None] for name, x in state.items()},
            torch.tensor([scores[j] for j in here])[None, None],
            mask_of(here, here[: max(0, len(here) - self.cache.recipe.scorer.unscored)]),
            self.positions[b, here][None, None].int(),
            self.merged[b][h].memory, logits["scale"], logits["softcap"], self.index,
        )  # fmt: skip
        made = self.merged[b][h].merge(self.merger, group, h)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        if made.keys is not None:
            self.keys[b, h, here] = made.keys[0, 0].to(self.keys.dtype)
        if made.values is not None:
            self.values[b, h, here] = made.values[0, 0].to(self.values.dtype)
        for name, x in made.state.items():
            self.state[name][b, h, here] = x[0, 0]

    def centroids(self, queries: Tensor, positions: Tensor, real: Tensor) -> Any:
        """What stands for the evicted, and `queries [B, heads, Q, D]` as they must be seen: keys
        `[B, H, n, D]` where they stand; None without centroids.
        """
        merger = self.merger
        if not isinstance(merger, CentroidMerger):
            return None
        rows = [[head.centroids(merger, self.keys, self.values) for head in r] for r in self.folded]
        keys, values, bias, at = (
            torch.stack([torch.stack([getattr(head, name) for head in row]) for row in rows])
            for name in ("keys", "values", "bias", "positions")
        )
        if merger.rotated:
            return Centroids(keys, values, bias, at, bias), queries
        if merger.placing == "slot":
            at = self.slots(at, bias, positions, real)
        elif merger.placing == "positionless":
            at = torch.zeros_like(at)
            queries = self.rope.shift(queries, -positions[:, None].expand(queries.shape[:3]))
        return Centroids(self.rope.rotate(keys, at), values, bias, at, bias), queries

    def slots(self, at: Tensor, bias: Tensor, positions: Tensor, real: Tensor) -> Tensor:
        """One place for each centroid, in the order of their mean positions, right before the rest."""
        places = torch.zeros_like(at)
        for b, row in enumerate(self.folded):
            new = [p for p, ok in zip(positions[b].tolist(), real[b].tolist(), strict=True) if ok]
            first = new[-1] - len(new) + 1 if new else 0
            pinned = self.pinned(b)
            for h, head in enumerate(row):
                used = (
                    head.centroids(self.merger, self.keys, self.values).mass > -math.inf
                ).nonzero()
                order = sorted(used.flatten().tolist(), key=lambda j: (at[b, h, j].item(), j))
                live = [j for j, ok in enumerate(self.alive[b, h].tolist()) if ok]
                window = len([j for j in live if j not in pinned])
                for rank, j in enumerate(order):
                    places[b, h, j] = first - window - len(order) + rank
        return places

    def seal(self, b: int, h: int) -> None:
        fmt = self.cache.format
        if fmt is None:
            return
        waiting = self.unsealed[b][h]
        pages = max(0, len(waiting) - fmt.residual) // 64
        if not pages:
            return
        page, self.unsealed[b][h] = waiting[: 64 * pages], waiting[64 * pages :]
        keys, values = self.keys[b, h, page], self.values[b, h, page]
        positions, dtype = self.positions[b, page], self.keys.dtype
        if fmt.pre_rope:
            keys = self.rope.unrotate(keys, positions).to(dtype)
        cell = self.cells[b][h]
        read = cell.read(keys.unflatten(0, (-1, 64)), values.unflatten(0, (-1, 64)))
        keys, values = (x.flatten(0, 1) for x in read)
        if fmt.pre_rope:
            keys = self.rope.rotate(keys, positions).to(dtype)
        self.keys, self.values = self.keys.clone(), self.values.clone()
        self.keys[b, h, page], self.values[b, h, page] = keys, values
        for i, j in enumerate(page):
            self.tile[b][h][j] = page[i // 64 * 64] * 2 + i % 64 // 32


def mask_of(here: list[int], chosen: Any) -> Tensor:
    return torch.tensor([j in set(chosen) for j in here])[None, None]


def contested(values: list[dict[int, float]], split: list[int]) -> bool:
    """Whether rounding may have decided between the heads: the last one in of one head is worth as
    much as the first one out of another, up to noise.
    """
    heads = [sorted(value.values(), reverse=True) for value in values]
    last = [head[n - 1] for head, n in zip(heads, split, strict=True) if n]
    first = [head[n] for head, n in zip(heads, split, strict=True) if n < len(head)]
    return any(abs(a - b) <= NOISE * abs(b) for a in last for b in first if a < math.inf)


class ShadowCache(Cache):
    def __init__(self, model: Any, recipe: str, budget: Any = None):
        self.close_calls = 0  # selections that rounding may have decided
        self.recipe = Recipe.parse(recipe)
        self.budget = None if budget is None else Budget.parse(budget)
        self.format = self.recipe.format
        pins = [p.pinned for p in (self.recipe.scorer, self.format) if p is not None]
        self.sinks = max(pins, default=0)
        self.model = model
        kinds, kwargs = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        if isinstance(kwargs, dict):  # before transformers 5.20: one dict for all layers
            kwargs = [kwargs] * len(kinds)
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.compressed = len(full)
        # slots of the layers that stay as they are
        windows = [kw.get("sliding_window", 0) for kw in kwargs]
        self.windows = sum(w for i, w in enumerate(windows) if i not in full)
        super().__init__(
            layers=[
                ShadowLayer(self, i, full.index(i))
                if kind == "full_attention"
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kw)
                for i, (kind, kw) in enumerate(zip(kinds, kwargs, strict=True))
            ]
        )


def shadow_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    layer = getattr(key, "shadow", None)
    B, heads, Q, D = query.shape
    H, T = key.shape[1], key.shape[2]
    groups = heads // H
    scale = D**-0.5 if scaling is None else scaling
    columns_at = kwargs["position_ids"].expand(B, Q)
    if attention_mask is None:
        attention_mask = torch.zeros(1, 1, Q, T)
    diagonal = attention_mask[:, 0, :, T - Q :].diagonal(dim1=-2, dim2=-1) > -1
    real = diagonal.expand(B, Q)
    centroids = None
    if layer is not None and layer.alive.shape[2]:
        centroids = layer.centroids(query, columns_at, real)

    def logits_of(keys: Tensor, query: Tensor = query) -> Tensor:
        logits = query @ keys.repeat_interleave(groups, 1).transpose(2, 3) * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    logits = logits_of(key)
    if layer is not None and "mass" in layer.state:
        mass = torch.zeros(B, H, T)
        mass[:, :, : layer.alive.shape[2]] = layer.state["mass"]
        logits = logits + mass.repeat_interleave(groups, 1)[:, :, None]
    hidden = attention_mask < -1
    if layer is not None:
        dead = torch.zeros(B, H, T, dtype=torch.bool)
        dead[:, :, : layer.alive.shape[2]] = ~layer.alive
        hidden = hidden | dead.repeat_interleave(groups, 1)[:, :, None]
    columns = [logits.masked_fill(hidden, torch.finfo(logits.dtype).min)]
    values = value
    if centroids is not None:  # one key that stands for exp(mass) tokens
        held, turned = centroids
        bias = held.bias.repeat_interleave(groups, 1)[:, :, None]
        columns.append(logits_of(held.keys.to(key.dtype), turned.to(key.dtype)) + bias)
        values = torch.cat([value, held.values.to(value.dtype)], 2)
    if s_aux is not None:
        columns.append(s_aux.view(1, heads, 1, 1).expand(B, heads, Q, 1))
    weights = torch.cat(columns, -1).softmax(-1)
    out = weights[..., : values.shape[2]] @ values.repeat_interleave(groups, 1)
    if layer is not None:
        layer.take_in(
            query.view(B, H, groups, Q, D),
            real,
            columns_at,
            weights[..., :T].view(B, H, groups, Q, T),
            scale=scale,
            softcap=softcap,
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shadow_attention)
AttentionMaskInterface.register(NAME, eager_mask)

"""`LayerPlan`: what a recipe means for one layer, worked out once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvloom.core.block import GRANULE
from kvloom.core.budget import DENSE_BYTES, Budget, CellCost
from kvloom.core.format import PAGE, Layout, PageBatch, PageFormat, Place
from kvloom.core.merge import CentroidMerger, Merger, SurvivorMerger
from kvloom.core.policy import Allocator, Queries
from kvloom.core.recipe import Recipe
from kvloom.positions.rope import RopeSpec

QUERIES = frozenset({"queries", "pre_rope_queries"})
UNBOUNDED = 1 << 40  # a capacity that is never reached
_META_DTYPES = {"positions": torch.int32, "mass": torch.float32}


@dataclass(frozen=True)
class LayerPlan:
    """The static side of a compressed layer.

    Attributes:
        recipe, budget: as given. format: the recipe's, or dense.
        layer, layers: index among the compressed layers, and their number.
        heads: KV heads; key_dim, value_dim: their widths; dtype: the model's.
        rope: the layer's rotation, if the recipe needs it.
        group: query heads per KV head.
        other_elements: numbers of this dtype that layers which are not compressed hold per row.
        output_weight: `[H, G, E, hidden]`, see `Entries`; the model's own storage, not a copy.
        track_positions: keep original positions even if no policy asks for them.
    """

    recipe: Recipe
    budget: Budget | None
    format: PageFormat
    layer: int
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    rope: RopeSpec | None = None
    track_positions: bool = False
    group: int = 1
    other_elements: int = 0
    output_weight: Tensor | None = None

    def __deepcopy__(self, memo: object) -> LayerPlan:
        return self  # immutable, and it refers to the model's weights

    @cached_property
    def layout(self) -> Layout:
        return self.format.layout(self.key_dim, self.value_dim, self.dtype)

    @cached_property
    def place(self) -> Place:
        """This layer, as a format knows it."""
        return Place(self.layer, self.layers, self.heads, self.key_dim, self.value_dim, self.rope)

    @cached_property
    def sinks(self) -> int:
        scorer = self.recipe.scorer
        return max(self.format.pinned, scorer.pinned if scorer else 0)

    @cached_property
    def evicts(self) -> bool:
        """Whether entries can ever leave."""
        scorer = self.recipe.scorer
        return self.recipe.evicts and scorer is not None and self.layer not in scorer.exempt_layers

    @cached_property
    def merger(self) -> Merger | None:
        """What becomes of this layer's losers; None: they are dropped."""
        merger = self.recipe.merger
        return merger if merger is not None and merger.serves(self.layer) else None

    @cached_property
    def fullest(self) -> LayerPlan:
        """The plan of the first layer that the merger serves: no layer needs more room."""
        merger = self.recipe.merger
        served = [i for i in range(self.layers) if merger is not None and merger.serves(i)]
        return replace(self, layer=served[0]) if served else self

    @cached_property
    def centroids(self) -> int:
        """How many centroids each head keeps."""
        return 0 if self.merger is None else self.merger.centroids

    @cached_property
    def changes_pages(self) -> bool:
        """Whether a merger writes into pages."""
        return isinstance(self.merger, SurvivorMerger) and self.format.in_place

    @cached_property
    def slots_centroids(self) -> bool:
        """Whether centroids stand right before the exact entries."""
        merger = self.merger
        return isinstance(merger, CentroidMerger) and merger.placing == "slot"

    @cached_property
    def bounded(self) -> bool:
        """Whether there is a ceiling."""
        scorer = self.recipe.scorer
        return bool(
            self.evicts and self.recipe.schedule.bounded and scorer and not scorer.sets_target
        )

    @cached_property
    def fills_pages(self) -> bool:
        """Whether the tail may grow inside the page that it will become."""
        return self.format.in_place and not self.evicts and not self.meta

    @cached_property
    def overshoot(self) -> int:
        """How many entries beyond its capacity a head may hold, by the schedule."""
        return int(self.recipe.schedule.peak(torch.zeros(1, dtype=torch.int64)))

    @cached_property
    def unpaged(self) -> int:
        """Up to how many entries, sinks aside, a head holds without pages at its peak."""
        if not self.bounded:
            return 0
        # too few to fill a page, where heads do not share their budget
        few = 0 if self.pools else PAGE + self.format.residual - 1
        if not (self.format.in_place and self.format.unpaged):
            return few
        return max(few, self.format.unpaged + self.overshoot)

    def unpaged_cells(self, capacity: Tensor) -> Tensor:
        """Which cells of `capacity [B, H]` never need a page: host bool `[B, H]`."""
        return self.cost.unpaged_cells(self.recipe.schedule.peak(capacity))

    @cached_property
    def drops_oldest(self) -> bool:
        """Whether an eviction only moves the start of each head's entries."""
        scorer, plain = self.recipe.scorer, not isinstance(self.merger, SurvivorMerger)
        plain = plain and self.format.movable and not self.pools and not self.observes
        return bool(scorer and scorer.oldest_first and plain)

    @cached_property
    def observes(self) -> bool:
        """Whether a policy wants to see attention."""
        return "attention_mass" in self.recipe.needs

    @cached_property
    def remembers(self) -> bool:
        """Whether the scorer wants to see queries."""
        scorer = self.recipe.scorer
        return scorer is not None and bool(scorer.needs & QUERIES)

    @cached_property
    def pools(self) -> bool:
        """Whether the heads of this layer share one budget."""
        return self.recipe.allocator is not None and self.recipe.allocator.pools

    @cached_property
    def needs_rope(self) -> bool:
        """Whether keys or queries must be turned."""
        turned = {"pre_rope_keys", "pre_rope_queries", "rope"} & self.recipe.needs
        return self.pre_rope or self.in_cache or bool(turned)

    @cached_property
    def memory_nbytes(self) -> float:
        """Bytes per (row, head) of what scorer and merger remember."""
        memories: list[Tensor] = []
        one = torch.zeros(1, 1, dtype=torch.int64)
        for policy in (self.recipe.scorer, self.merger):
            if policy is None:
                continue
            memory = policy.memory(1, self.heads) if isinstance(policy, Merger) else {}
            if policy.needs & QUERIES:
                states = torch.zeros(1, self.heads, self.group, 1, self.key_dim, dtype=self.dtype)
                if "pre_rope_queries" in policy.needs:
                    states = states.float()
                memory = policy.remember(memory, Queries(states, one, one.bool()))
            memories += memory.values()
        return sum(x.untyped_storage().nbytes() for x in memories) / self.heads

    @cached_property
    def format_nbytes(self) -> float:
        """Bytes per (row, head) of what the format carries: statistics, now and before the newest
        sealing, and tables (of one row).
        """
        dtype, place = self.dtype, self.place
        if place.rope is None:  # not known before the first token; sizes do not depend on it
            place = replace(
                place, rope=RopeSpec(torch.ones(self.key_dim // 2), self.key_dim // 2 * 2)
            )
        tables = self.format.tables(place, torch.device("cpu"))
        owner = torch.zeros(self.heads, dtype=torch.int64)
        keys = torch.zeros(self.heads, PAGE, self.key_dim, dtype=dtype)
        values = torch.zeros(self.heads, PAGE, self.value_dim, dtype=dtype)
        heads = torch.arange(self.heads)
        batch = PageBatch(keys, values, owner, heads, 1, self.heads, tables)
        held = [*tables.values(), *2 * list(self.format.encode(batch, {}).statistics.values())]
        return sum(x.untyped_storage().nbytes() for x in held) / self.heads

    @cached_property
    def pre_rope(self) -> bool:
        """Whether pages hold keys before rotation."""
        return self.format.pre_rope

    @cached_property
    def in_cache(self) -> bool:
        return bool(self.recipe.scorer and self.recipe.scorer.in_cache)

    @cached_property
    def positions(self) -> bool:
        """Whether the exact tiers carry original positions."""
        return self.slot_positions or self.in_cache

    @cached_property
    def slot_positions(self) -> bool:
        """Whether something reads the position of every single entry."""
        named = {"positions", "pre_rope_keys"} & self.recipe.needs
        return bool(named) or self.pre_rope or self.track_positions

    @cached_property
    def base_positions(self) -> bool:
        """Whether a page's first position tells those of all its slots (nothing is evicted)."""
        return self.positions and not self.evicts

    @cached_property
    def meta(self) -> dict[str, torch.dtype]:
        """Per-slot metadata of the exact tail."""
        names = list(self.recipe.scorer.state_names) if self.recipe.scorer else []
        names += [] if self.merger is None else self.merger.state_names
        if self.positions:
            names.insert(0, "positions")
        return {name: _META_DTYPES.get(name, torch.float32) for name in names}

    @cached_property
    def page_meta(self) -> dict[str, torch.dtype]:
        """Per-slot metadata of pages; explicit positions only if a policy reads them per slot."""
        drop = self.base_positions or not self.slot_positions
        return {n: d for n, d in self.meta.items() if n != "positions" or not drop}

    @cached_property
    def cost(self) -> CellCost:
        """What one (row, head) of this layer costs."""
        size = self.dtype.itemsize
        meta = sum(d.itemsize for d in self.meta.values())
        page_meta = sum(d.itemsize for d in self.page_meta.values())
        alive = 1 if self.evicts else 0
        width = self.key_dim + self.value_dim
        return CellCost(
            sinks=self.sinks,
            centroids=self.centroids,
            residual=self.format.residual,
            exact_slot=width * size + meta,
            centroid_slot=width * self.centroid_dtype.itemsize + 2 * 4,
            page=self.layout.page_nbytes(scattered=self.evicts),
            page_meta=PAGE * (page_meta + alive),
            overhead=24 * torch.int64.itemsize
            + math.ceil(self.memory_nbytes)
            + math.ceil(self.format_nbytes),
            dense_slot=width * DENSE_BYTES,
            shrinks=self.pools,
            unpaged=self.unpaged,
        )

    @cached_property
    def centroid_dtype(self) -> torch.dtype:
        merger = self.merger
        return merger.dtype(self.dtype) if isinstance(merger, CentroidMerger) else self.dtype

    @cached_property
    def shares(self) -> Tensor:
        """Relative budget per (layer, head), host fp64 `[layers, heads]`: mean 1 over those that evict."""
        shares = (self.recipe.allocator or Allocator()).shares(self.layers, self.heads)
        exempt = self.recipe.scorer.exempt_layers if self.recipe.scorer else ()
        evicting = [i for i in range(self.layers) if i not in exempt]
        return shares / shares[evicting].mean() if exempt and evicting else shares

    @property
    def growing(self) -> bool:
        """Whether what may stay grows with the tokens seen."""
        sets = self.recipe.scorer is not None and self.recipe.scorer.sets_target
        return sets or (self.budget is not None and self.budget.kind == "share")

    @property
    def shared_out(self) -> bool:
        """Whether rows divide a fixed number of bytes, so that what may stay falls when they multiply."""
        return self.budget is not None and self.budget.kind == "bytes"

    @cached_property
    def least(self) -> int:
        """The fewest entries per head that a budget in bytes stands for: one granule at its peak."""
        return self.sinks + max(1, GRANULE - self.overshoot)

    def capacity(self, seen: Tensor) -> Tensor | None:
        """C, entries per head and row: host int64 `[B, H]`; None if nothing is evicted.

        `seen` is host int64 `[B]`, the valid tokens of each row.
        """
        scorer = self.recipe.scorer
        if scorer is None or not self.evicts:
            return None
        if scorer.sets_target:  # it goes by what is there, and nothing else may depend on this
            return torch.full((len(seen), self.heads), UNBOUNDED)
        shares = self.shares[self.layer]
        if self.budget is None:
            assert scorer.capacity is not None
            return self._scaled(scorer.capacity, shares).expand(len(seen), -1)
        if self.budget.kind == "tokens":
            return self._scaled(int(self.budget.amount) - self.centroids, shares).expand(
                len(seen), -1
            )
        if self.shared_out:
            row = self.budget.amount / len(seen) - self.other_nbytes
            return self._affordable(row).expand(len(seen), -1)
        dense = self.cost.dense_slot * self.layers * self.heads
        rows = [self._affordable(self.budget.amount * dense * n) for n in seen.tolist()]
        return torch.stack(rows)

    def _scaled(self, entries: int, shares: Tensor) -> Tensor:
        scaled = ((entries - self.sinks) * shares).floor().long() + self.sinks
        return scaled.clamp_min(self.sinks + 1)

    def _affordable(self, row_bytes: float) -> Tensor:
        """The largest C per head whose peak is within this layer's share of a row's bytes.

        Rows are worked out one by one, so that a row keeps the same entries in any batch.
        """
        cells = self._cell_bytes(row_bytes)[self.layer]
        return (self.cost.solve(cells) - self.overshoot).clamp_min(self.least)

    def _cell_bytes(self, row_bytes: float) -> Tensor:
        """A row's bytes for each (layer, head), by their shares; none gets less than `least` entries cost, which
        the others pay.
        """
        shares, least = self.shares, self._least_bytes / self.heads
        short = torch.zeros_like(shares, dtype=torch.bool)
        cells = row_bytes * shares / shares.sum()
        while bool((cells < least).any()):
            short |= cells < least
            if bool(short.all()):
                break
            free = row_bytes - least * int(short.sum())
            cells = torch.where(short, least, free * shares / shares[~short].sum())
        return cells

    def floor(self) -> int:
        """The least bytes of the whole cache for one row: `least` entries in every head."""
        return self.layers * self._least_bytes + self.other_nbytes

    @cached_property
    def _least_bytes(self) -> int:
        """Of a layer with `least` entries in every head."""
        return self.fullest.ceiling(torch.full((1, self.heads), self.least))

    @property
    def other_nbytes(self) -> int:
        """Bytes per row of the layers that are not compressed, once their windows are full."""
        return self.other_elements * self.dtype.itemsize

    def ceiling(self, capacity: Tensor) -> int:
        """Bytes that heads of these capacities `[B, H]` hold at most after a commit."""
        peaks = self.recipe.schedule.peak(capacity)
        if not self.pools or (len(capacity) == 1 and not self.counts_entries):
            return self.cost.nbytes(peaks)
        assert self.recipe.allocator is not None  # any head may turn out the largest
        largest = self.recipe.allocator.largest(peaks)
        return self.cost.nbytes(peaks, int(largest.max()))

    @property
    def counts_entries(self) -> bool:
        """Whether the budget is a number of entries, not of bytes."""
        return self.budget is None or self.budget.kind == "tokens"

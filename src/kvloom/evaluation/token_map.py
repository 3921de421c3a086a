"""What became of every token of a text in every head of a cache: exact, packed, merged or dropped.

The text runs through the recipe's real cache; at the end the live stores say which positions they hold, in
which tier and with which mass. What is gone was merged if the merger took it in when it left, which is
noted as it happens, and dropped otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.core.merge import CentroidMerger, Group, Losers, Merged, Merger, SurvivorMerger
from kvloom.core.recipe import Recipe
from kvloom.core.store import LayerStore
from kvloom.core.view import entries_of
from kvloom.evaluation import analysis_rows, identity, results
from kvloom.evaluation.subjects import Cell
from kvloom.evaluation.texts import Document
from kvloom.hf import load
from kvloom.hf.cache import CompressedCache
from kvloom.hf.usage import Usage

NAME = "tokens"
DROPPED, MERGED, PACKED, TAIL, SINK = range(5)
TIERS = ("dropped", "merged", "packed", "exact", "sink")


@dataclass(frozen=True)
class Layer:
    """One compressed layer at the end.

    Attributes:
        layer: the model's index. exact_bits: of each element in sinks and tail. key_bits, value_bits:
            effective bits per element in its pages, scales included, a mean over them; None: no pages.
        centroids: how many each head has; 0 without. heaviest: tokens that the largest of these, or of
            the exact entries, stands for.
    """

    layer: int
    exact_bits: int
    key_bits: float | None
    value_bits: float | None
    centroids: list[int]
    heaviest: float


@dataclass(frozen=True)
class TokenMap:
    """The row of `kvloom analyze tokens`.

    Attributes:
        measured_at: UTC. took: seconds. chunk: tokens per forward. words: the text of each token.
            layers: those that are compressed. heads: KV heads of each.
        seen: tokens x heads x layers; kept, merged, dropped: what became of them; these add up to it.
        data: sha256 of the tensors beside the row: `tier` uint8 `[L, H, T]`, an index of `TIERS`;
            `mass` fp32 `[L, H, T]`, tokens that an entry stands for, 0 where there is none.
    """

    measured_at: str
    took: float
    model: results.Model
    subject: results.Subject
    text: results.Text
    environment: results.Environment
    chunk: int
    words: list[str]
    layers: list[Layer]
    heads: int
    seen: int
    kept: int
    merged: int
    dropped: int
    data: str = ""


def analyze(
    model: Any,
    name: str,
    tokenizer: Any,
    recipe: str,
    budget: str | None,
    text: Document,
    chunk: int,
) -> tuple[TokenMap, dict[str, Tensor]]:
    """Feed a text through a recipe's cache, `chunk` tokens at a time, and look at what is left.

    Raises ValueError if recipe, budget and model do not fit together.
    """
    begun = time.perf_counter()
    parsed = Recipe.parse(str(Recipe.parse(recipe)))  # its policies are nobody else's
    size = None if budget is None else Budget.parse(budget)
    cache = CompressedCache(model, parsed, size, track_positions=True)
    ids = text.ids.to(model.device)
    with torch.inference_mode(), _noting(cache, parsed.merger) as folded:
        for part in ids.split(chunk):
            load.forward(model, part[None], cache)
        stores = _stores(cache)
        looked = [_tiers(store, len(ids)) for store in stores]
    tier, mass = (torch.stack(x) for x in zip(*looked, strict=True))
    for index, head, position in folded:
        if tier[index, head, position] == DROPPED:
            tier[index, head, position] = MERGED
    stats = cache.stats()
    kept = int((tier > MERGED).sum())
    merged, dropped = (int((tier == t).sum()) for t in (MERGED, DROPPED))
    if (merged, merged + dropped) != (stats.merged, stats.evicted):
        raise ValueError(
            f"recipe '{parsed}' cannot be mapped: {merged} tokens were seen to merge and {dropped} to drop, "
            f"but the cache counted {stats.merged} merged of {stats.evicted} evicted"
        )
    layers = [
        _layer(held.layer_idx, store, mass[i]) for i, (held, store) in enumerate(zip(cache.compressed, stores, strict=True))
    ]  # fmt: skip
    row = TokenMap(
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        took=round(time.perf_counter() - begun, 3),
        model=identity.model_facts(model, name),
        subject=Cell(parsed, size).facts,
        text=text.facts,
        environment=identity.environment(model.device),
        chunk=chunk,
        words=[tokenizer.decode([i]) for i in text.ids.tolist()],
        layers=layers,
        heads=tier.shape[1],
        seen=tier.numel(),
        kept=kept,
        merged=merged,
        dropped=dropped,
    )
    return row, {"tier": tier, "mass": mass}


def _stores(cache: CompressedCache) -> list[LayerStore]:
    found = [layer.store for layer in cache.compressed]
    assert all(store is not None for store in found)
    return [store for store in found if store is not None]


Folded = list[tuple[int, int, int]]  # layer among the compressed ones, head, position


@contextmanager
def _noting(cache: CompressedCache, merger: Merger | None) -> Iterator[Folded]:
    """Note what a merger takes in, by layer, head and position. The merger is left as it was."""
    noted: Folded = []

    def note(layer: int, which: Tensor, positions: Tensor) -> None:
        for head, slot in which[0].nonzero().tolist():
            noted.append((layer, head, int(positions[0, head, slot])))

    def ingest(losers: Losers, centroids: Any, memory: Any) -> Any:
        (layer,) = (i for i, x in enumerate(cache.compressed) if x.store is not None and x.store.centroids is centroids)  # fmt: skip
        done = type(merger).ingest(merger, losers, centroids, memory)  # type: ignore[union-attr]
        taken = merger.takes(losers)  # type: ignore[union-attr]
        note(layer, losers.valid if taken is None else taken & losers.valid, losers.positions)
        return done

    def merge(group: Group) -> Merged:
        done: Merged = type(merger).merge(merger, group)  # type: ignore[union-attr]
        assert group.positions is not None
        note(group.layer, group.lost if done.folded is None else done.folded, group.positions)
        return done

    wrapped = {CentroidMerger: ("ingest", ingest), SurvivorMerger: ("merge", merge)}
    names = [own for kind, own in wrapped.items() if isinstance(merger, kind)]
    for name, replaced in names:
        object.__setattr__(merger, name, replaced)  # policies are frozen; this one is our own copy
    try:
        yield noted
    finally:
        for name, _ in names:
            object.__delattr__(merger, name)


def _tiers(store: LayerStore, tokens: int) -> tuple[Tensor, Tensor]:
    """Tier and mass of each token in each head, `[H, T]` both; what is gone counts as dropped."""
    entries, exact = entries_of(store), store.tail.longest
    sealed = entries.valid.shape[2] - exact
    ones = torch.ones(entries.valid.shape, device=entries.valid.device)
    mass = entries.meta["mass"].exp() if "mass" in entries.meta else ones
    parts = [
        (entries.positions[..., :sealed], entries.valid[..., :sealed], mass[..., :sealed], PACKED),
        (entries.positions[..., sealed:], entries.valid[..., sealed:], mass[..., sealed:], TAIL),
    ]
    if store.plan.format.in_place:  # dense pages are as exact as the tail
        parts[0] = (*parts[0][:3], TAIL)
    if store.sinks is not None:
        pinned = store.sinks.meta["positions"]
        valid = store.sinks.valid(store.sinks.capacity)
        parts.append((pinned, valid, torch.ones_like(pinned, dtype=torch.float32), SINK))
    heads = entries.valid.shape[1]
    tier = torch.full((heads, tokens), DROPPED, dtype=torch.uint8)
    masses = torch.zeros(heads, tokens)
    for positions, valid, weight, kind in parts:
        for head in range(heads):
            at = positions[0, head][valid[0, head]].long().cpu()
            tier[head, at] = kind
            masses[head, at] = weight[0, head][valid[0, head]].float().cpu()
    store.tail.pack()  # looking must not cost bytes
    return tier, masses


def _layer(index: int, store: LayerStore, mass: Tensor) -> Layer:
    used, exact = Usage.of(store), 8 * store.plan.dtype.itemsize
    live, outside = int(store.pool.live.sum()), int((store.stored - store.pool.live).sum())
    key_dim, value_dim = store.plan.key_dim, store.plan.value_dim
    heavy, counts = float(mass.max()), [0] * mass.shape[0]
    if store.centroids is not None:
        n = store.centroids.longest
        held = store.centroids.meta["mass"][0, :, :n].exp().cpu()
        held = held * store.centroids.valid(n)[0].cpu()
        counts = (held > 0).sum(-1).tolist()
        heavy = max(heavy, float(held.max())) if held.numel() else heavy
    return Layer(
        layer=index,
        exact_bits=exact,
        key_bits=(used.key_bits - outside * key_dim * exact) / (live * key_dim) if live else None,
        value_bits=(used.value_bits - outside * value_dim * exact) / (live * value_dim)
        if live
        else None,
        centroids=counts,
        heaviest=round(heavy, 3),
    )


def load_map(folder: Path) -> tuple[TokenMap, dict[str, Tensor]]:
    """A row and its tensors; see `analysis_rows.load`."""
    return analysis_rows.load(TokenMap, folder, NAME)

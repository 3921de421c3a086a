"""A sealed entry keeps its codes and scales for good: nothing is quantized twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.format import PAGE
from kvloom.core.policy import Scorer
from kvloom.core.recipe import Recipe
from kvloom.core.schedule import Lazy
from kvloom.core.slab import Slab
from kvloom.kernels.layout import TILE
from tests import models
from tests.contract.recipes import registered, short

Bits = tuple[bytes, ...]


@dataclass(frozen=True)
class Neighbours(Scorer):
    """Neighbours are worth about the same, so that old tiles live on as well as single entries."""

    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    def score(self, entries):
        at = entries.positions
        return (at // 32 * 7919 % 101).float() + (at * 31 % 17) / 17


def stored_bits(pool, slab: Slab, b: int, h: int) -> list[Bits]:
    """What each slot of a cell reads from, field by field: its own bits, its tile's, its sets'."""
    pages = torch.arange(int(slab.used[b, h])) + slab.first[b, h]
    columns = [slab.slot[name][pages].flatten(0, 1) for name in slab.slot]
    for name, field in pool.layout.tile.items():
        tiles = slab.tile[name][pages].flatten(0, 1)
        if field.codec is None:
            columns.append(tiles.repeat_interleave(TILE, 0))
        else:
            columns.append(field.codec.unpack(tiles).flatten(0, 1))
    for family, fields in slab.sets.items():
        of = slab.index[family][pages].flatten().repeat_interleave(TILE).long()
        for x in fields.values():
            held = x[of.clamp_min(0)] if len(x) else x.new_zeros(len(of), *x.shape[1:])
            columns.append(torch.where((of >= 0).view(-1, *[1] * (held.ndim - 1)), held, 0))
    raw = [
        x.reshape(len(x), -1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
        for x in columns
        if len(x)
    ]
    return [tuple(bytes(x[i].tolist()) for x in raw) for i in range(len(pages) * PAGE)]


def sealed(cache) -> dict[tuple[int, int, int, int], Bits]:
    """(layer, row, head, position) of every live sealed entry -> what it reads from."""
    found = {}
    for n, layer in enumerate(cache.layers):
        pool = layer.store.pool
        for slab in pool.slabs:
            valid, positions = slab.valid(), slab.positions()
            for b, h in torch.cartesian_prod(*map(torch.arange, slab.first.shape)).tolist():
                for slot, bits in enumerate(stored_bits(pool, slab, b, h)):
                    if valid[b, h, slot]:
                        found[n, b, h, int(positions[b, h, slot])] = bits
    return found


def paged(text):
    """Whether a few hundred entries lie in pages."""
    fmt = Recipe.parse(text).format
    return fmt is None or not (fmt.in_place and fmt.unpaged)


PAGED = [text for text in registered("format") if paged(text)]


@pytest.mark.parametrize("text", PAGED, ids=short)
def test_codes_and_scales_never_change(text):
    """Over 1,000 tokens, evictions and compactions that move what survives."""
    model = models.build("llama")
    recipe = Recipe.of(Neighbours(), Lazy(every=20), Recipe.parse(text).format)
    first = 350 + recipe.format.residual
    cache = CompressedCache(model, recipe, f"{first - 30}tok", track_positions=True)
    ids = models.tokens(first + 1000)
    model(ids[:, :first], past_key_values=cache)
    before = sealed(cache)
    assert before
    seen = dict(before)
    for i, start in enumerate(range(first, first + 1000, 50)):
        model(ids[:, start : start + 50], past_key_values=cache)
        if i % 10 == 9:
            now = sealed(cache)
            assert all(seen[at] == bits for at, bits in now.items() if at in seen)
            seen.update(now)
    counters = [layer.store.counters for layer in cache.layers]
    assert all(c.compactions > 0 for c in counters) and cache.stats().evicted > 0
    survivors = before.keys() & sealed(cache).keys()
    assert survivors, "nothing that was sealed at first has lived on"

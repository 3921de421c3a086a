"""Attention over pages in another basis equals attention over what they decode to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.format import PageFormat
from kvloom.core.recipe import Recipe
from tests import models


@dataclass(frozen=True)
class Decoded(PageFormat):
    """Stores like another format, but is always read in the model's basis."""

    inner: Any = None

    @property
    def movable(self):
        return self.inner.movable

    def layout(self, key_dim, value_dim, dtype):
        return self.inner.layout(key_dim, value_dim, dtype)

    def tables(self, place, device):
        return self.inner.tables(place, device)

    def encode(self, batch, statistics):
        return self.inner.encode(batch, statistics)

    def decode(self, stored, dtype):
        return self.inner.decode(stored, dtype)


FORMATS = ["rotated_int4", "int4(hadamard='both', keys='channel')", "turboquant_mse(bits=2)"]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox_80", "gemma2"])
@pytest.mark.parametrize("evicting", [False, True])
def test_queries_turn_instead_of_pages(family, text, evicting):
    """Grouped queries, head_dim 80 (partial rotation), softcaps; chunks, then single tokens."""
    fmt = Recipe.parse(text).format
    assert fmt.turns and not Decoded(fmt).turns
    model, ids = models.build(family), models.tokens(220, rows=2)
    outputs = []
    for one in (fmt, Decoded(fmt)):
        recipe = Recipe.parse("h2o | lazy(every=16)") | one if evicting else Recipe.of(one)
        cache = CompressedCache(model, recipe, "180tok" if evicting else None)
        chunks = [ids[:, :200], *ids[:, 200:].split(1, 1)]
        outputs.append(
            torch.cat([model(c, past_key_values=cache).logits for c in chunks], 1)[:, 200:]
        )
        stores = [layer.store for layer in cache.layers if hasattr(layer, "store")]
        assert all(int(store.pool.live.min()) > 0 for store in stores)
    spread = outputs[1].abs().max()
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-4 * float(spread)


def test_the_queries_of_a_group_turn_with_their_head():
    """Signs differ between heads, so taking another head's would be seen."""
    model, ids = models.build("llama"), models.tokens(200)

    def last(recipe, flip=False):
        cache = CompressedCache(model, recipe)
        model(ids[:, :199], past_key_values=cache)
        for layer in cache.layers if flip else []:
            for table in layer.store.pool.tables.values():
                table.copy_(table.flip(0))
        return model(ids[:, 199:], past_key_values=cache).logits

    dense, text = last("none"), "int8(hadamard='both')"
    near, far = ((last(text, flip) - dense).abs().max() for flip in (False, True))
    assert float(far) > 20 * float(near)

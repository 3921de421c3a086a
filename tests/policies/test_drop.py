"""`drop` in a recipe is the recipe without it: the same entries, bytes, answers and shortcuts."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache, Recipe
from tests.models import build, generate, left_padded, tokens


@pytest.mark.parametrize("fmt", ["", " | int4"])
@pytest.mark.parametrize("scorer", ["streaming_llm", "h2o", "snapkv(window=16)", "knorm"])
def test_changes_nothing(scorer, fmt):
    runs = []
    for recipe in (scorer + fmt, f"{scorer} | drop{fmt}"):
        model = build("llama")
        cache = CompressedCache(model, recipe, "90tok")
        runs.append((cache, generate(model, cache, *left_padded([150, 121]))))
    (plain, want), (dropped, got) = runs
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert dropped.nbytes == plain.nbytes
    assert dropped.ceiling() == plain.ceiling()
    assert dropped.stats().evicted == plain.stats().evicted > 0
    assert dropped.stats().merged == 0


@pytest.mark.parametrize("scorer", ["streaming_llm(positions='original')", "recent"])
def test_windows_still_only_move_their_start(scorer):
    model = build("llama")
    cache = CompressedCache(model, f"{scorer} | drop | int4", "90tok")
    model(tokens(100), past_key_values=cache)
    assert cache.stats().evicted > 0
    assert all(layer.store.plan.drops_oldest for layer in cache.compressed)


def test_recipe_says_it():
    assert str(Recipe.parse("h2o | drop | int4")) == "h2o | drop | int4"

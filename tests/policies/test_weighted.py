"""A fixed split over layers and heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import CompressedCache
from kvloom.policies.allocate.weighted import Weighted
from tests.models import build, tokens

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights, weights, st.integers(1, 7), st.integers(1, 5))
def test_shares_are_the_products_over_their_mean(by_layer, by_head, layers, heads):
    shares = Weighted(by_layer, by_head).shares(layers, heads)
    grid = [
        [by_layer[i % len(by_layer)] * by_head[j % len(by_head)] for j in range(heads)]
        for i in range(layers)
    ]
    mean = sum(map(sum, grid)) / (layers * heads)
    want = torch.tensor(grid, dtype=torch.float64) / mean
    assert shares.dtype == torch.float64
    torch.testing.assert_close(shares, want)
    assert float(shares.mean()) == pytest.approx(1)


def test_a_split_does_not_depend_on_the_unit():
    a, b = Weighted((1, 2), (3, 5)), Weighted((10, 20), (0.3, 0.5))
    torch.testing.assert_close(a.shares(4, 2), b.shares(4, 2))


@pytest.mark.parametrize("scorer", ["h2o", "streaming_llm(sinks=2, positions='original')"])
@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
def test_every_head_keeps_its_own_share(scorer, fmt):
    model = build("llama")
    recipe = f"{scorer} | weighted(layers=(3.0, 1.0), heads=(1.0, 2.0)) | {fmt}"
    cache = CompressedCache(model, recipe, "60tok", track_positions=True)
    model(tokens(200), past_key_values=cache)
    for i in range(4):
        model(tokens(1, seed=i), past_key_values=cache)
    sinks = 2 if "sinks" in scorer else 0
    grid = [[a * b for b in (1.0, 2.0)] for a in (3.0, 1.0, 3.0)]  # repeated cyclically
    mean = sum(map(sum, grid)) / 6
    for layer, row in enumerate(grid):
        want = [int((60 - sinks) * w / mean) + sinks for w in row]
        assert [len(kept) for kept in cache.positions(layer)[0]] == want


def test_a_tiny_share_keeps_one_entry_beyond_the_sinks():
    model = build("llama")
    recipe = "streaming_llm(sinks=4, positions='original') | weighted(heads=(1.0, 1000.0))"
    cache = CompressedCache(model, recipe, "20tok", track_positions=True)
    model(tokens(100), past_key_values=cache)
    small, large = cache.positions(0)[0]
    assert small == [0, 1, 2, 3, 99]
    assert len(large) == 4 + int(16 * 2000 / 1001)


@pytest.mark.parametrize("name", ["layers", "heads"])
@pytest.mark.parametrize("bad", [(), (0,), (-1.0, 2.0), [1.0], 3.0])
def test_bad_weights_are_restated(name, bad):
    with pytest.raises(ValueError, match=rf"weighted\({name}=.*{name} must be a tuple of numbers"):
        Weighted(**{name: bad})

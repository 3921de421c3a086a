"""CriticalKV from the paper, in loops: half by attention, half by attention times projected values."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom import CompressedCache, Recipe
from kvloom.core.entries import Entries
from kvloom.policies.evict import criticalkv
from kvloom.policies.evict.criticalkv import CriticalKV
from tests.models import build, tokens
from tests.policies.brute import best, check_keeps
from tests.policies.replay import run
from tests.policies.test_snapkv import snap
from tests.policies.test_tova import own


def critical(base, budget, window, alpha=0.5, epsilon=1e-4):
    """Two stages, written as one order: what stage 1 chose, then everything by the product."""
    layers = build("llama").model.layers

    def scores(layer, heads, h):
        a, head = base(layer, heads, h), heads[h]
        weight = layers[layer].self_attn.o_proj.weight.double()
        G, E = 2, 16
        product = []
        for x, value in zip(a, head.values, strict=True):
            columns = [slice((h * G + g) * E, (h * G + g + 1) * E) for g in range(G)]
            norms = [sum(abs(float(y)) for y in weight[:, c] @ value) for c in columns]
            product.append((x + epsilon) * sum(norms) / G)
        target = min(budget, len(a))
        first = best(a, int(alpha * target), min(window, target))
        return [math.inf if j in first else x for j, x in enumerate(product)]

    return scores


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(
    ("recipe", "base", "window", "given"),
    [
        ("criticalkv(base='snapkv(window=8)')", snap(8, 5, "avg"), 8, {}),
        ("criticalkv(base='tova(per_head=True)', first_stage=0.2, epsilon=0.1)", own, 1, {"alpha": 0.2, "epsilon": 0.1}),
        ("criticalkv(base='snapkv(window=8)', first_stage=0) | int4", snap(8, 5, "avg"), 8, {"alpha": 0}),
    ],
)  # fmt: skip
def test_keeps_what_the_paper_keeps(recipe, base, window, given, lengths):
    check_keeps(recipe, critical(base, 70, window, **given), 70, window=window, lengths=lengths)


def test_differs_from_its_base_and_equals_it_if_all_is_stage_one():
    kept = []
    for recipe in (
        "snapkv(window=8)",
        "criticalkv(base='snapkv(window=8)')",
        "criticalkv(base='snapkv(window=8)', first_stage=1.0)",
    ):
        model = build("llama")
        cache = CompressedCache(model, recipe, "50tok", track_positions=True)
        list(run(model, cache, tokens(120), [0, 100, 110, 120]))
        kept.append([cache.positions(layer) for layer in range(3)])
    assert kept[0] == kept[2] != kept[1]


def test_blocks_change_nothing(monkeypatch):
    values, weight = torch.randn(2, 3, 10, 4), torch.randn(3, 2, 4, 7)
    entries = Entries(
        torch.ones(2, 3, 10, dtype=torch.bool), {}, None, lambda: values, output_weight=weight
    )
    whole = criticalkv._output_norm(entries)
    monkeypatch.setattr(criticalkv, "_BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(criticalkv._output_norm(entries), whole)
    want = torch.einsum("bhse,hgen->bhgsn", values, weight).abs().sum(-1).mean(2)
    torch.testing.assert_close(whole, want)


@pytest.mark.parametrize(
    "base", ["h2o(recent=0.25, sinks=3)", "knorm(skip_layers=(0,), keep='high')", "random"]
)
def test_everything_but_the_scores_is_the_bases(base):
    ours, theirs = CriticalKV(base=base), Recipe.parse(base).scorer
    for name in ("pinned", "capacity", "sets_target", "exempt_layers", "state_names", "in_cache"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.needs == theirs.needs | {"values", "output_weight"}
    model = build("llama")
    cache = CompressedCache(model, ours, "50tok")
    list(run(model, cache, tokens(120), [0, 100, 110, 120]))
    assert cache.stats().evicted > 0


def test_text_round_trips_with_a_text_inside():
    for base in ("snapkv(window=32)", "snapkv(pooling='max')", 'snapkv(pooling="max")'):
        recipe = Recipe.parse(CriticalKV(base=base, epsilon=0.5))
        assert Recipe.parse(str(recipe)) == recipe
    assert (
        str(Recipe.parse("criticalkv(base='snapkv(window=32)') | int4"))
        == "criticalkv(base='snapkv(window=32)') | int4"
    )


def test_negative_scores_are_no_attention():
    model = build("llama")
    cache = CompressedCache(model, "criticalkv(base='keydiff')", "50tok")
    with pytest.raises(
        ValueError, match=r"criticalkv\(base='keydiff'\).*scores of keydiff are negative"
    ):
        model(tokens(80), past_key_values=cache)


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"base": "snapcv"}, "unknown method 'snapcv'; did you mean 'snapkv'"),
        ({"base": 3}, "base is a scorer as text"),
        ({"base": "int4"}, "base must be one scorer"),
        ({"base": "snapkv | int4"}, "base must be one scorer"),
        ({"base": "streaming_llm"}, "original positions"),
        ({"base": "criticalkv"}, "base must be one scorer"),
        ({"base": "snapkv(window=0)"}, "window must be"),
        ({"first_stage": 1.5}, "first_stage must be within 0..1"),
        ({"epsilon": -1}, "epsilon must be a number >= 0"),
    ],
)
def test_bad_parameters_are_restated(bad, rule):
    with pytest.raises(ValueError, match=rule):
        CriticalKV(**bad)

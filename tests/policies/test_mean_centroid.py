"""One centroid with mass: exact for equal members, and its masses add up to tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import Budget, CompressedCache, Recipe
from kvloom.core.attend import Call
from kvloom.core.block import Block
from kvloom.core.merge import Losers
from kvloom.core.plan import LayerPlan
from kvloom.core.store import LayerStore
from kvloom.formats.dense import Dense
from kvloom.policies.merge.mean_centroid import MeanCentroid
from kvloom.positions import RopeSpec
from tests.models import build, left_padded, tokens

FP32 = torch.finfo(torch.float32).eps
SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)
D = 8


def nothing(B=1, H=1):
    """The centroid of no tokens at all."""
    mass = torch.full((B, H, 1), -math.inf)
    zero = torch.zeros(B, H, 1, D)
    count = torch.zeros(B, H, dtype=torch.int64)
    return Block(zero, zero.clone(), count, {"mass": mass, "positions": torch.zeros(B, H, 1)})


def losers(n, seed=0, B=1, H=1, mass=None, valid=None):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(B, H, n, D, generator=generator)
    values = torch.randn(B, H, n, D, generator=generator)
    positions = torch.randint(0, 5000, (B, H, n), generator=generator, dtype=torch.int32)
    return Losers(
        keys,
        values,
        torch.zeros(B, H, n) if mass is None else mass,
        positions,
        torch.ones(B, H, n, dtype=torch.bool) if valid is None else valid,
    )


def part(x, where):
    return Losers(*(t[:, :, where] for t in (x.keys, x.values, x.mass, x.positions, x.valid)))


def weighted_mean(x):
    """In float64: `(key, value, position, tokens)` of one head."""
    weight = x.mass.double().exp() * x.valid
    total = weight.sum(-1, keepdim=True)

    def mean(t):
        return (t.double() * (weight[..., None] if t.ndim == 4 else weight)).sum(2) / (
            total if t.ndim == 4 else total[..., 0]
        )

    return mean(x.keys), mean(x.values), mean(x.positions), total[..., 0]


def assert_is(centroids, want, folds):
    """Each fold rounds the mass, its logarithm, and every mean a few times."""
    key, value, position, total = want
    mass = centroids.meta["mass"][..., 0].double()
    slack = 8 * folds * FP32 * (1 + float(total.log().abs().max()))
    assert ((mass.exp() - total).abs() <= slack * total).all()
    for got, exact in (
        (centroids.keys[:, :, 0], key),
        (centroids.values[:, :, 0], value),
        (centroids.meta["positions"][..., 0], position),
    ):
        assert (got.double() - exact).abs().max() <= slack * max(5.0, float(exact.abs().max()))


@SETTINGS
@given(st.integers(1, 30), st.integers(0, 99), st.data())
def test_folding_in_parts_equals_the_mean_of_all(n, seed, data):
    x = losers(n, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    edges = [0, *cuts, n]
    centroids = nothing()
    for a, b in pairwise(edges):  # equal cuts: nothing is folded
        centroids = MeanCentroid().fold(part(x, slice(a, b)), centroids)
    assert_is(centroids, weighted_mean(x), len(edges))


@SETTINGS
@given(st.integers(2, 20), st.integers(0, 99), st.data())
def test_masses_of_merges_of_merges_add_up(n, seed, data):
    """Losers that are centroids themselves bring their own mass."""
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 5000), min_size=n, max_size=n)))
    x = losers(n, seed, mass=counts.float().log().view(1, 1, n))
    centroids = MeanCentroid().fold(x, nothing())
    key, value, position, _ = weighted_mean(x)
    total = torch.full((1, 1), float(counts.sum()), dtype=torch.float64)
    assert_is(centroids, (key, value, position, total), 1)


@SETTINGS
@given(st.integers(2, 20), st.integers(0, 99))
def test_the_order_of_losers_does_not_matter(n, seed):
    x = losers(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = MeanCentroid().fold(part(x, order), nothing())
    plain = MeanCentroid().fold(x, nothing())
    assert_is(shuffled, weighted_mean(x), 1)
    assert torch.equal(shuffled.meta["mass"], plain.meta["mass"])


def test_slots_that_are_not_losers_do_not_count():
    valid = torch.tensor([[[True, False, True, False, True]]])
    x = losers(5, valid=valid)
    x.keys[:, :, 1] = 1e30
    x.values[:, :, 3] = -1e30
    x.positions[:, :, 1] = 2**30
    assert_is(MeanCentroid().fold(x, nothing()), weighted_mean(part(x, [0, 2, 4])), 1)


def test_folding_nothing_changes_nothing():
    full = MeanCentroid().fold(losers(7), nothing())
    for empty in (losers(0), losers(3, valid=torch.zeros(1, 1, 3, dtype=torch.bool))):
        same = MeanCentroid().fold(empty, full)
        assert torch.equal(same.keys, full.keys)
        assert torch.equal(same.values, full.values)
        assert torch.equal(same.meta["positions"], full.meta["positions"])
        gone = (same.meta["mass"].double().exp() / full.meta["mass"].double().exp() - 1).abs()
        assert gone.max() <= 4 * FP32


def test_an_empty_centroid_weighs_nothing_and_is_finite():
    empty = MeanCentroid().fold(losers(3, valid=torch.zeros(1, 1, 3, dtype=torch.bool)), nothing())
    assert (empty.meta["mass"] == -math.inf).all()
    assert not empty.keys.any()
    assert not empty.values.any()
    again = MeanCentroid().fold(losers(4), empty)
    assert_is(again, weighted_mean(losers(4)), 1)


def test_fold_is_pure():
    x, before = losers(4), MeanCentroid().fold(losers(3, seed=1), nothing())
    kept = before.keys.clone(), before.meta["mass"].clone(), x.keys.clone()
    MeanCentroid().fold(x, before)
    assert torch.equal(before.keys, kept[0])
    assert torch.equal(before.meta["mass"], kept[1])
    assert torch.equal(x.keys, kept[2])


def test_rows_and_heads_are_independent():
    x = losers(6, B=2, H=3)
    together = MeanCentroid().fold(x, nothing(2, 3))
    for b in range(2):
        for h in range(3):
            cell = slice(b, b + 1), slice(h, h + 1)
            alone = Losers(*(t[cell] for t in (x.keys, x.values, x.mass, x.positions, x.valid)))
            assert torch.equal(
                MeanCentroid().fold(alone, nothing()).keys[0, 0], together.keys[b, h]
            )


@pytest.mark.parametrize("count", [10_000, 1_000_000, 100_000_000])
def test_a_mean_of_many_still_moves(count):
    """In 16 bits a mean over thousands of tokens stops; here a page still counts."""
    start = nothing()
    start.meta["mass"] = torch.full((1, 1, 1), math.log(count))
    start.keys[:] = 1.0
    x = losers(64)
    x.keys[:], x.values[:] = 2.0, 2.0
    moved = MeanCentroid().fold(x, start)
    weight = 64 / (count + 64)
    assert float(moved.keys[0, 0, 0, 0]) == pytest.approx(1 + weight, abs=2 * FP32)
    got = float(moved.meta["mass"].double().exp()) - count
    assert abs(got - 64) <= 4 * FP32 * math.log(count) * count


def test_folding_token_by_token_does_not_drift():
    """20,000 folds of one token count 20,000: whole numbers are restored from the log mass."""
    centroids, n = nothing(), 20_000
    x = losers(1)
    x.keys[:], x.values[:] = 1.0, -1.0
    for _ in range(n):
        centroids = MeanCentroid().fold(x, centroids)
    assert abs(float(centroids.meta["mass"].double().exp()) - n) <= 2 * FP32 * math.log(n) * n
    assert abs(float(centroids.keys.max()) - 1) <= math.sqrt(n) * FP32


# -- within a layer --------------------------------------------------------------------------------

ROPE = RopeSpec(10000.0 ** -(torch.arange(0, D, 2) / D), D)


def layer(budget):
    recipe = Recipe.parse("streaming_llm(sinks=0, positions='original') | mean_centroid")
    plan = LayerPlan(recipe, Budget.parse(budget), Dense(), 0, 1, 1, D, D, torch.float32, rope=ROPE)
    return LayerStore(plan, torch.zeros(1, 1, 0, D), torch.zeros(1, 1, 0, D))


def feed(store, keys, values, query, positions):
    call = Call(query, D**-0.5)
    out, forward = store.forward(keys, values, call, None, positions)
    store.commit(forward)
    return out


@pytest.mark.parametrize("same", [24, 300])
def test_identical_members_give_full_attention(same):
    """Same key, value and position: the centroid attends exactly like all of them."""
    generator = torch.Generator().manual_seed(4)
    store, kept = layer("17tok"), 16
    one, value = torch.randn(D, generator=generator), torch.randn(D, generator=generator)
    keys = torch.cat([one.expand(same, D), torch.randn(kept, D, generator=generator)])[None, None]
    values = torch.cat([value.expand(same, D), torch.randn(kept, D, generator=generator)])
    values = values[None, None]
    positions = torch.cat([torch.full((same,), 5), torch.arange(6, 6 + kept)])[None]
    rotated = ROPE.rotate(keys, positions[:, None])
    total = same + kept
    feed(store, rotated, values, torch.zeros(1, 1, 1, total, D), positions)
    assert int(store.stored) == kept
    tokens_folded = float(store.centroids.meta["mass"].double().exp())
    assert tokens_folded == pytest.approx(same, rel=4 * FP32 * math.log(total))

    query = torch.randn(1, 1, 2, 1, D, generator=generator)
    new_key, new_value = torch.randn(2, 1, 1, 1, D, generator=generator)
    at = torch.tensor([[6 + kept]])
    turned = ROPE.rotate(query, at[:, None, None].expand(1, 1, 2, 1))
    last = ROPE.rotate(new_key, at[:, None])
    out = feed(store, last, new_value, turned, at)
    all_keys, all_values = torch.cat([rotated, last], 2), torch.cat([values, new_value], 2)

    def attention(dtype):
        logits = turned.to(dtype) @ all_keys.to(dtype).transpose(-1, -2)[:, :, None] * D**-0.5
        return logits.softmax(-1) @ all_values.to(dtype)[:, :, None]

    exact = attention(torch.float64)
    naive = (attention(torch.float32) - exact).abs().max()
    # un-rotating, averaging and rotating again round the key a few times more
    slack = 16 * FP32 * float(all_values.abs().max()) * float(turned.norm()) * float(one.norm())
    assert (out.double() - exact).abs().max() <= 2 * naive + slack
    # and without the mass it would be something else
    dropped = torch.cat([rotated[:, :, same - 1 :], last], 2)
    logits = turned @ dropped.transpose(-1, -2)[:, :, None] * D**-0.5
    other = logits.softmax(-1) @ torch.cat([values[:, :, same - 1 :], new_value], 2)[:, :, None]
    assert (other - exact).abs().max() > 100 * (2 * naive + slack)


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4", "int4_channel"])
@pytest.mark.parametrize("lengths", [None, [230, 90]])
def test_masses_and_entries_are_all_the_tokens(fmt, lengths):
    """Nothing is lost and nothing is counted twice, through pages, chunks and padding."""
    model = build("llama")
    cache = CompressedCache(
        model, f"h2o(sinks=2) | mean_centroid | lazy(every=8) | {fmt}", "100tok"
    )
    ids, mask = (tokens(230), None) if lengths is None else left_padded(lengths)
    for start in range(0, 230, 46):
        stop = start + 46
        extra = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
            extra = {"attention_mask": mask[:, :stop], "position_ids": positions}
        model(ids[:, start:stop], past_key_values=cache, **extra)
        for compressed in cache.compressed:
            store = compressed.store
            folded = store.centroids.meta["mass"].double().exp().sum(-1)
            total = store.stored + folded
            seen = torch.tensor([stop] if mask is None else mask[:, :stop].sum(1).tolist())
            assert (total - seen[:, None]).abs().max() <= 40 * FP32 * stop

"""`mp_kvm`: its engine against a loop in plain Python, its promises, its switches, its errors."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from kvloom import Budget, CompressedCache, Recipe
from kvloom.core.attend import Call
from kvloom.core.block import Block
from kvloom.core.merge import Losers
from kvloom.core.plan import LayerPlan
from kvloom.core.store import LayerStore
from kvloom.formats.dense import Dense
from kvloom.policies.merge import _clusters
from kvloom.policies.merge.mp_kvm import MPKVM
from kvloom.positions import RopeSpec
from tests.models import build, left_padded, tokens
from tests.oracle.clusters import Cluster, Loop

FP32 = torch.finfo(torch.float32).eps
D, E = 6, 5
SMALL = MPKVM(max_centroids=6)


def nothing(merger, B=1, H=1, dtype=torch.float32, dims=(D, E)):
    """The centroids of no tokens at all."""
    n = merger.centroids
    meta = {"mass": torch.full((B, H, n), -math.inf), "positions": torch.zeros(B, H, n)}
    keys, values = (torch.zeros(B, H, n, d, dtype=dtype) for d in dims)
    return Block(keys, values, torch.zeros(B, H, dtype=torch.int64), meta)


def losers(n, seed=0, B=1, H=1, start=0, counts=None, groups=5, noise=0.35, dims=(D, E)):
    """Keys around a few directions, in order; head h of row b has `counts[b][h]` of them."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(B, H, groups, dims[0], generator=torch.Generator().manual_seed(99))
    which = torch.randint(0, groups, (n,), generator=generator)
    keys = middles[:, :, which] + noise * torch.randn(B, H, n, dims[0], generator=generator)
    values = torch.randn(B, H, n, dims[1], generator=generator)
    positions = (start + torch.arange(n)).int().expand(B, H, n)
    have = torch.full((B, H), n) if counts is None else torch.tensor(counts)
    valid = torch.arange(n) < have[..., None]
    return Losers(keys, values, torch.zeros(B, H, n), positions, valid)


def fields(x):
    return x.keys, x.values, x.mass, x.positions, x.valid


def fold(merger, parts, B=1, H=1, dtype=torch.float32):
    """Centroids and memory after some folds."""
    dims = [x.shape[3] for x in (parts[0].keys, parts[0].values)]
    held, memory = nothing(merger, B, H, dtype, dims), merger.memory(B, H)
    for part in parts:
        held, memory = merger.ingest(part, held, memory)
    return held, memory


def masses(held):
    return held.meta["mass"].double().exp()


# -- against the loop ------------------------------------------------------------------------------

RULES = {
    "default": {},
    "token by token": {"block": 1},
    "strict": {"similarity_threshold": 0.97},
    "loose": {"similarity_threshold": -0.2},
    "one centroid": {"max_centroids": 1},
    "adaptive": {"adaptive_threshold": True, "threshold_quantile": 0.6},
    "adaptive, one by one": {"adaptive_threshold": True, "threshold_quantile": 0.3, "block": 1},
    "lightest": {"min_merge_similarity": 0.93, "similarity_threshold": 0.95},
    "first": {"init_preserve_first_n": 5, "block": 4, "similarity_threshold": 0.3},
    "euclidean": {"metric": "euclidean", "similarity_threshold": -0.5, "min_merge_similarity": -0.8},
    "ema": {"update": "ema", "ema": 0.7, "similarity_threshold": 0.5},
    "ema, one by one": {"update": "ema", "ema": 0.7, "similarity_threshold": 0.5, "block": 1},
    "stride": {"sample_stride": 3, "block": 4},
    "waiting": {"flush_threshold": 4, "similarity_threshold": 0.9},
    "interval": {"flush_threshold": 9, "flush_interval": 12, "block": 4, "similarity_threshold": 0.9},
    "shared": {"per_head_clustering": False, "similarity_threshold": 0.6},
    "shared mean": {"per_head_clustering": False, "head_mean": True, "block": 3},
    "shared waiting": {"per_head_clustering": False, "flush_threshold": 3, "adaptive_threshold": True},
}  # fmt: skip


def loop(merger, parts, b, heads):
    """The slow centroids of these heads of one row."""
    slow = Loop(merger)
    for part in parts:
        taken = []
        for i in range(part.valid.shape[2]):
            if part.valid[b, heads[0], i]:
                keys, values = (x[b, heads, i].double().tolist() for x in (part.keys, part.values))
                taken.append(Cluster(keys, values, float(part.positions[b, 0, i]), 1.0))
        slow.fold(taken)
    return slow.clusters


def assert_are(held, want, b, h, at, folds):
    """Head `h` of row `b` holds the clusters `want`, of which it is number `at`."""
    n = len(want)
    assert int(held.count[b, h]) == n
    assert masses(held)[b, h, :n].tolist() == pytest.approx([c.mass for c in want], rel=20 * FP32)
    assert (held.meta["mass"][b, h, n:] == -math.inf).all()
    for got, exact in (
        (held.keys, [c.keys[at] for c in want]),
        (held.values, [c.values[at] for c in want]),
        (held.meta["positions"], [c.position for c in want]),
    ):
        exact = torch.tensor(exact, dtype=torch.float64)
        error = (got[b, h, :n].double() - exact).abs().max()
        assert error <= 20 * folds * FP32 * (1 + exact.abs().max())


@pytest.mark.parametrize("name", RULES)
def test_equals_the_loop(name):
    """Ragged heads, several folds of unequal size, some heads with nothing to fold."""
    merger = dataclasses.replace(SMALL, **RULES[name])
    shared = not merger.per_head_clustering
    counts = [[[40, 23], [0, 7]], [[1, 0], [5, 5]], [[33, 17], [18, 35]], [[0, 3], [2, 0]]]
    if shared:
        counts = [[[row[0]] * 2 for row in each] for each in counts]
    parts = [losers(40, i, 2, 2, 40 * i, each) for i, each in enumerate(counts)]
    held, _ = fold(merger, parts, 2, 2)
    for b in range(2):
        for heads in [[0, 1]] if shared else [[0], [1]]:
            want = loop(merger, parts, b, heads)
            for at, h in enumerate(heads):
                assert_are(held, want, b, h, at, len(parts))
    assert int(held.count.max()) > 1 or merger.max_centroids == 1


def test_the_grid_puts_the_rules_to_the_test():
    """All the rules above lead to different centroids, but for the orders of the same rule."""
    results = {}
    for name, changes in RULES.items():
        merger = dataclasses.replace(SMALL, **changes)
        held, _ = fold(merger, [losers(40, i, 1, 2, 40 * i) for i in range(3)], 1, 2)
        results[name] = held.keys[:, :, : held.longest].flatten().tolist()
    assert len({tuple(x) for x in results.values()}) == len(results)


@pytest.mark.parametrize("name", RULES)
def test_reading_nothing_changes_nothing(name, monkeypatch):
    """Where a device must not be waited for, more steps are taken, and do nothing."""
    merger = dataclasses.replace(SMALL, **RULES[name])
    parts = [losers(33, i, 2, 2, 33 * i, [[33, 33], [9, 9]]) for i in range(3)]
    eager, _ = fold(merger, parts, 2, 2)
    monkeypatch.setattr(_clusters, "reading_is_free", lambda device: False)
    blind, _ = fold(merger, parts, 2, 2)
    assert torch.equal(blind.count, eager.count)
    assert torch.allclose(blind.keys, eager.keys, atol=20 * FP32)
    assert torch.allclose(masses(blind), masses(eager), rtol=20 * FP32)


@pytest.mark.parametrize("name", [name for name in RULES if "flush_threshold" not in RULES[name]])
def test_blocks_never_wait_for_the_device(name):
    """Tensors without data cannot be read: a fold up to its end is possible without."""
    merger = dataclasses.replace(SMALL, **RULES[name])
    part, meta = losers(40, B=2, H=2), torch.device("meta")
    held = nothing(merger, 2, 2).to(meta)
    memory = {name: x.to(meta) for name, x in merger.memory(2, 2).items()}
    content = _clusters._tokens(merger, Losers(*(x.to(meta) for x in fields(part))))
    clusters = _clusters.Clusters(merger, held, memory, merger.block)
    merges = []
    clusters._merge = lambda due, merge=clusters._merge: (merges.append(due), merge(due))
    for start in range(0, 40, merger.block):
        clusters.take(content.part(start, start + merger.block))
    assert len(merges) >= 40 - merger.max_centroids - merger.block
    with pytest.raises((NotImplementedError, RuntimeError)):  # and there it is read
        clusters.close(held)


# -- promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_members_are_kept_exactly(dtype):
    """However many: neither joining nor merging moves a mean of equal things."""
    few = losers(4, groups=4, noise=1.0)
    for x in (few.keys, few.values):
        x.copy_(x.to(dtype))
    order = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(3))
    many = Losers(*(x[:, :, order] for x in fields(few)))
    parts = [Losers(*(x[:, :, a:b] for x in fields(many))) for a, b in pairwise([0, 64, 65, 300])]
    for merger in (
        MPKVM(max_centroids=4, similarity_threshold=1.0),
        MPKVM(max_centroids=4, block=1),
    ):
        held, _ = fold(merger, parts, dtype=dtype)
        assert held.keys.dtype == dtype and int(held.count) == 4
        for i in range(4):
            j = int((held.keys[0, 0].float() - few.keys[0, 0, i]).norm(dim=-1).argmin())
            assert torch.equal(held.keys[0, 0, j].float(), few.keys[0, 0, i])
            assert torch.equal(held.values[0, 0, j].float(), few.values[0, 0, i])
            assert float(held.meta["positions"][0, 0, j]) == i
            assert float(masses(held)[0, 0, j]) == pytest.approx(int((order == i).sum()), rel=1e-6)


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_masses_sum_to_the_tokens(noise):
    """Through joins, merges and merges of merges, token by token and in chunks."""
    edges = [0, 500, *range(501, 800), 1500]
    x = losers(1500, noise=noise, H=2)
    parts = [Losers(*(t[:, :, a:b] for t in fields(x))) for a, b in pairwise(edges)]
    held, _ = fold(SMALL, parts, H=2)
    total = masses(held).sum(-1)
    assert (total - 1500).abs().max() <= 1500 * FP32 * math.log(1500)  # one rounding of the log
    assert torch.allclose(masses(held), masses(held).round(), rtol=FP32 * 8)
    mean = (held.meta["positions"] * masses(held)).sum(-1) / total
    assert (mean - 749.5).abs().max() <= 1e-3


def test_losers_bring_their_own_mass():
    one = losers(3, groups=3, noise=0.0)
    one.mass[:] = torch.tensor([5.0, 3.0, 11.0]).log()
    held, _ = fold(MPKVM(max_centroids=1, similarity_threshold=1.0), [one])
    weight = torch.tensor([5.0, 3.0, 11.0]) / 19
    assert float(masses(held)[0, 0, 0]) == pytest.approx(19, rel=4 * FP32)
    assert torch.allclose(held.keys[0, 0, 0], weight @ one.keys[0, 0], atol=8 * FP32)


@pytest.mark.parametrize("name", RULES)
def test_rows_do_not_touch_each_other(name):
    merger = dataclasses.replace(SMALL, **RULES[name])
    counts = [[30, 30], [0, 0], [11, 11]]
    parts = [losers(30, i, 3, 2, 30 * i, counts) for i in range(3)]
    order = torch.tensor([2, 0, 1])
    moved = [Losers(*(t[order] for t in fields(x))) for x in parts]
    held, memory = fold(merger, parts, 3, 2)
    other, its = fold(merger, moved, 3, 2)
    alone, _ = fold(merger, [Losers(*(t[2:, :, :20] for t in fields(x))) for x in parts], 1, 2)
    assert torch.equal(other.count, held.count[order]) and torch.equal(alone.count, held.count[2:])
    assert torch.allclose(other.keys, held.keys[order], atol=20 * FP32)
    assert torch.allclose(alone.keys, held.keys[2:], atol=20 * FP32)
    for n, x in memory.items():
        assert torch.allclose(its[n], x[order], atol=20 * FP32, equal_nan=True)


def test_what_is_not_a_loser_does_not_count():
    x = losers(20, counts=[[13]])
    plain, _ = fold(SMALL, [Losers(*(t[:, :, :13] for t in fields(x)))])
    x.keys[:, :, 13:], x.values[:, :, 13:], x.positions = math.inf, math.nan, x.positions.clone()
    x.positions[:, :, 13:] = 2**30
    dirty, _ = fold(SMALL, [x])
    assert torch.equal(dirty.keys, plain.keys) and torch.equal(dirty.values, plain.values)
    assert torch.equal(dirty.meta["mass"], plain.meta["mass"])


def test_folding_is_pure_and_nothing_folds_to_the_same():
    x = losers(30)
    held, memory = fold(MPKVM(max_centroids=6, adaptive_threshold=True), [x])
    before = [t.clone() for t in (held.keys, held.values, *held.meta.values(), *memory.values())]
    merger = MPKVM(max_centroids=6, adaptive_threshold=True)
    merger.ingest(losers(30, 1), held, memory)
    after = (held.keys, held.values, *held.meta.values(), *memory.values())
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True)
    )
    for none in (losers(0), losers(4, counts=[[0]])):
        same, kept = merger.ingest(none, held, memory)
        assert torch.equal(same.keys, held.keys) and torch.equal(same.count, held.count)
        assert torch.allclose(same.meta["mass"], held.meta["mass"], rtol=FP32 * 4)
        assert torch.equal(kept["best"].nan_to_num(7), memory["best"].nan_to_num(7))


@pytest.mark.parametrize("changes", [{}, {"flush_threshold": 5}, {"adaptive_threshold": True}])
def test_memory_is_bounded_at_any_length(changes):
    merger = MPKVM(max_centroids=6, init_preserve_first_n=2, **changes)
    held, memory = nothing(merger), merger.memory(1, 1)
    shapes, most = {n: x.shape for n, x in memory.items()}, 0
    for i in range(40):
        held, memory = merger.ingest(losers(17, i, noise=2.0, start=17 * i), held, memory)
        most = max(most, int(held.count))
        assert held.keys.shape[2] == merger.centroids
        assert {n: x.shape for n, x in memory.items()} == shapes
    assert most == 6 if merger.centroids == 6 else 6 < most <= merger.centroids


def test_an_isolated_key_stays_as_it_was():
    """A needle in 2,000 tokens of a few topics is a centroid of its own, wherever it was."""
    x = losers(2000, dims=(32, 8), groups=12, noise=0.2)
    generator = torch.Generator().manual_seed(8)
    needles = [3, 411, 1207, 1999]
    for i in needles:
        x.keys[:, :, i] = torch.randn(32, generator=generator)
    parts = [
        Losers(*(t[:, :, a:b] for t in fields(x))) for a, b in pairwise([0, 900, 1000, 1001, 2000])
    ]
    held, _ = fold(MPKVM(max_centroids=24), parts)
    for i in needles:
        at = (held.keys[0, 0] - x.keys[0, 0, i]).abs().amax(-1).argmin()
        assert torch.equal(held.keys[0, 0, at], x.keys[0, 0, i])
        assert torch.equal(held.values[0, 0, at], x.values[0, 0, i])
        assert float(held.meta["positions"][0, 0, at]) == i
        assert float(masses(held)[0, 0, at]) == 1


@pytest.mark.parametrize("block", [1, 16])
def test_groups_of_identical_tokens_give_full_attention(block):
    """Three tokens, each many times at one position: their centroids attend like all of them."""
    d, same, kept = 8, [7, 30, 19], 16
    rope = RopeSpec(10000.0 ** -(torch.arange(0, d, 2) / d), d)
    recipe = Recipe.parse(
        "streaming_llm(sinks=0, positions='original') | "
        f"mp_kvm(max_centroids=3, similarity_threshold=1.0, block={block})"
    )
    budget = Budget.parse(f"{kept + 3}tok")
    plan = LayerPlan(recipe, budget, Dense(), 0, 1, 1, d, d, torch.float32, rope=rope)
    store = LayerStore(plan, torch.zeros(1, 1, 0, d), torch.zeros(1, 1, 0, d))
    generator = torch.Generator().manual_seed(4)
    which = torch.cat(
        [torch.repeat_interleave(torch.arange(3), torch.tensor(same)), torch.arange(3, 3 + kept)]
    )
    rows = torch.randn(2, 1, 1, 3 + kept, d, generator=generator)
    keys, values = rows[0][:, :, which], rows[1][:, :, which]
    keys = rope.rotate(keys, which[None, None] * 5)

    def feed(keys, values, query, at):
        call = Call(query, d**-0.5)
        out, forward = store.forward(keys, values, call, None, at)
        store.commit(forward)
        return out

    total = len(which)
    feed(keys, values, torch.zeros(1, 1, 1, total, d), which[None] * 5)
    assert int(store.stored) == kept and int(store.centroids.count) == 3
    at = torch.tensor([[5 * (3 + kept)]])
    query = rope.rotate(
        torch.randn(1, 1, 2, 1, d, generator=generator), at[:, None, None].expand(1, 1, 2, 1)
    )
    new = torch.randn(1, 1, 1, d, generator=generator)
    out = feed(rope.rotate(new, at[:, None]), new, query, at)
    keys = torch.cat([keys, rope.rotate(new, at[:, None])], 2)
    values = torch.cat([values, new], 2)

    def attention(dtype, bias=0.0):
        logits = query.to(dtype) @ keys.to(dtype).transpose(-1, -2)[:, :, None] * d**-0.5
        return (logits + bias).softmax(-1) @ values.to(dtype)[:, :, None]

    exact = attention(torch.float64)
    naive = (attention(torch.float32) - exact).abs().max()
    # un-rotating and rotating again round the keys a few times more
    slack = (
        16 * FP32 * float(values.abs().max()) * float(query.norm()) * float(keys.norm(dim=-1).max())
    )
    assert (out.double() - exact).abs().max() <= 2 * naive + slack
    once = torch.cat(
        [-torch.tensor(same).log().repeat_interleave(torch.tensor(same)), torch.zeros(kept + 1)]
    )
    without = attention(torch.float64, once.double())  # a centroid that counted once
    assert (without - exact).abs().max() > 100 * (2 * naive + slack)


def turned(x, positions, rope):
    """`x [..., n, d]` at `positions [..., n]` in float64, pairs half a head apart."""
    angle = positions.double()[..., None] * rope.inv_freq.double()
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


@pytest.mark.parametrize(
    "how", ["positions='mean'", "positions='slot'", "positions='positionless'", "rope='post'"]
)
def test_centroids_in_bf16_err_no_more_than_naive_attention(how):
    """Everything that a bf16 layer holds, attended in float64 and naively in bf16."""
    H, G, Q, d, start, n = 2, 2, 24, 16, 3000, 300
    bf16, generator = torch.bfloat16, torch.Generator().manual_seed(6)
    rope = RopeSpec(10000.0 ** -(torch.arange(0, d, 2) / d), d)
    recipe = Recipe.parse(f"mp_kvm(max_centroids=12, similarity_threshold=0.6, {how})")
    plan = LayerPlan(recipe, Budget.parse("60tok"), Dense(), 0, 1, H, d, d, bf16, rope=rope)
    store = LayerStore(plan, *torch.zeros(2, 1, H, 0, d, dtype=bf16))

    def feed(n, start):
        pre, values = torch.randn(2, 1, H, n, d, generator=generator)
        at = torch.arange(start, start + n)[None]
        query = torch.randn(1, H, G, n, d, generator=generator)
        query = rope.rotate(query, at[:, None, None].expand(1, H, G, n)).to(bf16)
        keys, values = rope.rotate(pre, at[:, None]).to(bf16), values.to(bf16)
        out, forward = store.forward(keys, values, Call(query, d**-0.5, positions=at), None, at)
        return out, forward, query, keys, values, at

    _, forward, *_ = feed(n, start)
    store.commit(forward)
    held, exact = store.centroids, [store.sinks, store.tail]
    out, forward, query, keys, values, at = feed(Q, start + n)
    assert store.centroids is held and held.keys.dtype is bf16 and held.longest == 12
    assert int(store.stored[0, 0]) == 48 and not store.pool.slabs

    middle, seen = held.meta["positions"], query[:, :, :, :, None].double()
    if "slot" in how:
        middle = start + n - 44 - 12 + middle.argsort(-1).argsort(-1)
    if "post" in how:
        centroids = held.keys.double()
    elif "positionless" in how:  # at each query's own position, so as far as it is from itself
        places = at[0, :, None].expand(1, H, Q, 12).double()
        centroids = turned(held.keys[:, :, None].expand(1, H, Q, 12, d), places, rope)
    else:
        centroids = turned(held.keys, middle, rope)
    centroids = centroids if centroids.dim() == 5 else centroids[:, :, None].expand(1, H, Q, 12, d)
    rest = [*(b.keys[:, :, : b.longest].double() for b in exact), keys.double()]
    rest = torch.cat(rest, 2)[:, :, None].expand(1, H, Q, 48 + Q, d)
    content = [held.values, *(b.values[:, :, : b.longest] for b in exact), values]
    content, every = torch.cat(content, 2), torch.cat([centroids, rest], 3)
    bias = torch.cat([masses(held).log(), torch.zeros(1, H, 48 + Q)], -1)[:, :, None, None]
    bias = bias + torch.full((Q, 60 + Q), -math.inf).triu(61)

    def attention(dtype):
        logits = (seen.to(dtype) @ every[:, :, None].to(dtype).mT)[..., 0, :] * d**-0.5
        return ((logits + bias.to(dtype)).softmax(-1) @ content[:, :, None].to(dtype)).double()

    want = attention(torch.float64)
    naive = (attention(bf16) - want).abs().max()
    assert (out.double() - want).abs().max() <= 2 * naive
    none = bias.masked_fill(torch.arange(60 + Q) < 12, -math.inf)
    without = (seen @ every[:, :, None].mT)[..., 0, :] * d**-0.5 + none
    without = without.softmax(-1) @ content[:, :, None].double()
    assert (without - want).abs().max() > 10 * naive, "the centroids hardly matter"


# -- every parameter does something ----------------------------------------------------------------

FOLDING = {
    "max_centroids": {"max_centroids": 5},
    "similarity_threshold": {"similarity_threshold": 0.2},
    "adaptive_threshold": {"adaptive_threshold": True},
    "threshold_quantile": {"adaptive_threshold": True, "threshold_quantile": 0.1},
    "min_merge_similarity": {"min_merge_similarity": 0.99},
    "init_preserve_first_n": {"init_preserve_first_n": 20, "max_centroids": 20},
    "metric": {"metric": "euclidean"},
    "per_head_clustering": {"per_head_clustering": False},
    "head_mean": {"per_head_clustering": False, "head_mean": True},
    "update": {"update": "ema"},
    "ema": {"update": "ema", "ema": 0.5},
    "sample_stride": {"sample_stride": 2},
    "flush_threshold": {"flush_threshold": 5},
    "flush_interval": {"flush_threshold": 5, "flush_interval": 7},
    "block": {"block": 1},
}
LAYER = {
    "window_size": 40, "sinks": 2, "positions": "slot", "rope": "post", "mass_bias": False,
    "max_injected_centroids": 2, "per_layer_injection": (0,),
}  # fmt: skip


def test_every_parameter_is_put_to_the_test():
    assert {f.name for f in dataclasses.fields(MPKVM)} == {*FOLDING, *LAYER}


@pytest.mark.parametrize("name", FOLDING)
def test_parameters_of_folding_change_the_centroids(name):
    """Against the same policy with this parameter at its default."""
    changed = dataclasses.replace(SMALL, **FOLDING[name])
    base = SMALL.max_centroids if name == "max_centroids" else getattr(SMALL, name)
    default = dataclasses.replace(changed, **{name: base})
    parts = [losers(50, i, 1, 2, 50 * i, noise=0.6) for i in range(2)]
    results = [fold(merger, parts, 1, 2)[0] for merger in (default, changed)]
    (one, two), n = results, min(x.longest for x in results)
    assert not torch.equal(one.keys[:, :, :n], two.keys[:, :, :n])


def logits(recipe, budget="60tok", family="llama", n=150):
    model = build(family)
    cache = CompressedCache(model, recipe, budget)
    out = [model(tokens(n), past_key_values=cache).logits[:, -1:]]
    out += [model(tokens(1, seed=i), past_key_values=cache).logits for i in range(6)]
    return torch.cat(out[1:], 1)


@pytest.mark.parametrize("name", LAYER)
def test_parameters_of_the_layer_change_the_output(name):
    default = MPKVM(max_centroids=6, window_size=50)
    changed = dataclasses.replace(default, **{name: LAYER[name]})
    got, other = logits(default, None), logits(changed, None)
    assert torch.isfinite(got).all() and torch.isfinite(other).all()
    assert (got - other).abs().max() > 1e-3 * got.abs().max()


def test_three_places_for_a_centroid():
    each = [
        logits(f"mp_kvm(max_centroids=6, positions={p!r})")
        for p in ("mean", "slot", "positionless")
    ]
    for i in range(3):
        assert (each[i] - each[i - 1]).abs().max() > 1e-3 * each[i].abs().max()


def test_bias():
    mass = torch.tensor([[[2.0, 1.0, 2.0, 0.0, -math.inf]]])
    held = Block(
        torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), torch.tensor([[4]]), {"mass": mass}
    )

    def bias(**changes):
        return MPKVM(max_centroids=5, **changes).bias(held)[0, 0].tolist()

    hidden = -math.inf
    assert bias() == mass[0, 0].tolist()
    assert bias(mass_bias=False) == [0, 0, 0, 0, hidden]
    assert bias(max_injected_centroids=1) == [2, hidden, hidden, hidden, hidden]  # the older
    assert bias(max_injected_centroids=3) == [2, 1, 2, hidden, hidden]
    assert bias(max_injected_centroids=9, mass_bias=False) == [0, 0, 0, 0, hidden]
    assert bias(max_injected_centroids=2, mass_bias=False) == [0, hidden, 0, hidden, hidden]


# -- in recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "mp_kvm",
        "mp_kvm(window_size=64, sinks=0)",
        "h2o | mp_kvm(max_centroids=6)",
        "mp_kvm(max_centroids=6, per_layer_injection=(0, 2)) | int4",
        "mp_kvm(adaptive_threshold=True) | lazy(every=16) | int4",
        "mp_kvm_published",
        "mp_kvm_aggregator | int4",
        "mp_kvm_ema",
    ],
)
def test_text_round_trips(recipe):
    parsed = Recipe.parse(recipe)
    assert Recipe.parse(str(parsed)) == parsed
    assert parsed.merger.name == "mp_kvm" and parsed.evicts


def test_alone_it_brings_sinks_and_a_window():
    model = build("llama")
    cache = CompressedCache(model, "mp_kvm(window_size=32, sinks=3, max_centroids=6)")
    model(tokens(150), past_key_values=cache)
    for layer in cache.compressed:
        assert (layer.store.stored == 35).all() and (layer.store.sinks.count == 3).all()
        folded = masses(layer.store.centroids).sum(-1)
        assert torch.allclose(folded, torch.full_like(folded, 115), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe",
    [
        "mp_kvm(max_centroids=7)",
        "h2o | mp_kvm(max_centroids=7, positions='slot')",
        "mp_kvm(max_centroids=7, positions='positionless', flush_threshold=3) | int4",
        "mp_kvm(max_centroids=7, per_head_clustering=False, adaptive_threshold=True)",
        "recent | lazy(every=8) | mp_kvm(max_centroids=7, per_head_clustering=False, head_mean=True)",
    ],
)
def test_tokens_and_bytes_add_up_in_padded_chunks(recipe, dtype):
    model = build("llama", dtype=dtype)
    cache = CompressedCache(model, recipe, "90tok")
    ids, mask = left_padded([260, 130])
    edges = [*range(0, 240, 48), *range(240, 261)]
    for start, stop in pairwise(edges):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        out = model(
            ids[:, start:stop], past_key_values=cache, attention_mask=mask[:, :stop],
            position_ids=positions,
        )  # fmt: skip
        assert torch.isfinite(out.logits).all()
        assert cache.nbytes <= cache.ceiling()
        for layer in cache.compressed:
            store = layer.store
            held = store.stored + masses(store.centroids).sum(-1)
            assert (held - mask[:, :stop].sum(1)[:, None]).abs().max() <= 20 * FP32 * stop
    assert cache.stats().evicted > 0


@pytest.mark.parametrize("head_mean", [False, True])
def test_shared_clusters_are_the_same_in_all_heads(head_mean):
    """Of a row in any batch: also where it is padded."""
    recipe = f"mp_kvm(max_centroids=7, per_head_clustering=False, head_mean={head_mean})"
    ids, mask = left_padded([200, 111])
    model = build("llama")
    caches = [CompressedCache(model, recipe, "90tok") for _ in "ab"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids, past_key_values=caches[0], attention_mask=mask, position_ids=positions)
    model(ids[1:, 89:], past_key_values=caches[1])
    for layer, alone in zip(caches[0].compressed, caches[1].compressed, strict=True):
        both, one = layer.store.centroids, alone.store.centroids
        for x in both.meta.values():
            assert torch.equal(x[:, 0], x[:, 1])
        assert torch.allclose(both.keys[1:], one.keys, atol=1e-3)
        assert torch.allclose(both.meta["positions"][1:], one.meta["positions"], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])  # the last two rotate in part
def test_clusters_do_not_depend_on_where_a_text_stands(family):
    """Keys before rotation do not know their position; rotated ones, 777 places on, are others."""
    model, ids, offset = build(family), tokens(150), 777

    def centroids(rope, first):
        cache = CompressedCache(model, f"mp_kvm(max_centroids=7, rope={rope!r})", "60tok")
        model(ids, past_key_values=cache, position_ids=first + torch.arange(150)[None])
        return cache.compressed[0].store.centroids

    here, there = centroids("pre", 0), centroids("pre", offset)
    assert torch.equal(here.count, there.count) and here.longest == 7
    assert torch.allclose(masses(here), masses(there), rtol=8 * FP32)
    size = here.keys.abs().max()
    assert (here.keys - there.keys).abs().max() <= 20 * FP32 * size
    moved = there.meta["positions"] - here.meta["positions"]
    assert torch.allclose(moved, torch.full_like(moved, offset), atol=1e-2)
    assert (centroids("post", 0).keys - centroids("post", offset).keys).abs().max() > 0.1 * size


def test_a_sample_drops_the_rest():
    assert MPKVM().conserves and not MPKVM(sample_stride=2).conserves
    model = build("llama")
    cache = CompressedCache(model, "mp_kvm(max_centroids=6, sample_stride=4)", "60tok")
    model(tokens(150), past_key_values=cache)
    store, stats = cache.compressed[0].store, cache.stats()
    left = 150 - int(store.stored[0, 0])
    first = 4  # sinks
    sampled = sum(p % 4 == 0 for p in range(first, first + left))
    assert float(masses(store.centroids).sum(-1)[0, 0]) == pytest.approx(sampled, rel=1e-6)
    assert stats.evicted == 3 * 2 * left and stats.merged == 3 * 2 * sampled


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("window_size=0", "window_size must be an int >= 1, or None"),
        ("sinks=-1", "sinks must be an int >= 0"),
        ("max_centroids=0", "max_centroids must be an int >= 1"),
        ("max_centroids=2.0", "max_centroids must be an int >= 1"),
        ("similarity_threshold=1.1", "cosine similarity, within -1..1"),
        ("similarity_threshold=-1.1", "cosine similarity, within -1..1"),
        ("metric='euclidean', similarity_threshold=2", "at most 1"),
        ("metric='manhattan'", "metric is one of 'cosine', 'euclidean'"),
        ("min_merge_similarity='x'", "min_merge_similarity is a cosine similarity"),
        ("threshold_quantile=1.5", "within 0..1"),
        ("init_preserve_first_n=65", "init_preserve_first_n is at most max_centroids"),
        ("adaptive_threshold=1", "adaptive_threshold is True or False"),
        ("update='sum'", "update is one of 'mean', 'ema'"),
        ("ema=1.0", "ema must be at least 0 and below 1"),
        ("sample_stride=0", "sample_stride must be an int >= 1"),
        ("positions='sink'", "positions is one of 'mean', 'slot', 'positionless'"),
        ("rope='post', positions='slot'", "leave it out with rope='post'"),
        ("max_injected_centroids=0", "max_injected_centroids must be an int >= 1, or None"),
        ("per_layer_injection=3", "must be a tuple of layer numbers"),
        ("per_layer_injection=(0, -1)", "must be a tuple of layer numbers"),
        ("flush_threshold=-1", "flush_threshold must be an int >= 0"),
        ("block=0", "block must be an int >= 1"),
    ],
)
def test_bad_parameters_are_restated(given, message):
    with pytest.raises(ValueError) as error:
        Recipe.parse(f"mp_kvm({given})")
    assert message in str(error.value) and given.split(", ")[0] in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("h2o | mp_kvm(window_size=32)", "h2o says who stays; leave out window_size=32"),
        ("h2o | mp_kvm(sinks=2)", "h2o says who stays; leave out sinks=2"),
        ("h2o | mp_kvm(per_head_clustering=False)", "keep the same entries"),
        ("mp_kvm(per_head_clustering=False) | weighted(heads=(1.0, 0.6))", "keep the same entries"),
        ("mp_kvm(per_head_clustering=False) | ada", "keep the same entries"),
        ("mp_kvm(head_mean=True)", "say per_head_clustering=False"),
        ("mp_kvm(flush_interval=9)", "without a flush_threshold"),
        ("mp_kvm(per_layer_injection=(1, 3))", r"layers \[3\], but 3 are compressed"),
        ("mp_kvm(per_layer_injection=(7,))", r"layers \[7\], but 3 are compressed"),
        ("streaming_llm | mp_kvm", "positions='original'"),
    ],
)
def test_recipes_that_contradict_a_parameter(recipe, message):
    with pytest.raises(ValueError, match=message):
        CompressedCache(build("llama"), recipe, "120tok")


def test_the_floor_is_that_of_a_layer_with_centroids():
    model = build("llama")
    for recipe in (
        "mp_kvm(max_centroids=40)",
        "mp_kvm(max_centroids=40, per_layer_injection=(2,))",
    ):
        with pytest.raises(ValueError, match="4 sinks, 40 centroids and 1 entry"):
            CompressedCache(model, recipe, "44tok")
        cache = CompressedCache(model, recipe, "45tok")
        floor = cache.floor()
        with pytest.raises(ValueError, match="below the floor"):
            CompressedCache(model, recipe, floor - 1)
        cache = CompressedCache(model, recipe, floor)
        model(tokens(150), past_key_values=cache)
        assert cache.nbytes <= floor


def test_a_window_and_a_budget_are_two_sizes():
    with pytest.raises(ValueError, match="states its own size"):
        CompressedCache(build("llama"), "mp_kvm(window_size=64)", "120tok")
    with pytest.raises(ValueError, match="a budget and none was given"):
        CompressedCache(build("llama"), "mp_kvm")

"""Promises that hold for whatever is registered, whoever wrote it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import json
from types import FunctionType, MethodType, ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvloom import CompressedCache, Recipe
from kvloom.core import registry
from kvloom.core.view import entries_of
from kvloom.formats.dense import Dense
from kvloom.hf.context import Host
from tests.contract import recipes
from tests.contract.contests import contests
from tests.contract.covering import covering
from tests.contract.recipes import CAPACITY, FACTORS, NONE, allowed, registered
from tests.models import build, generate, left_padded, tokens


def evicting(strength: int) -> list[str]:
    """Recipes in which every registered policy occurs, or every pair of two."""
    cases = (dict(zip(FACTORS, case, strict=True)) for case in covering(FACTORS, strength, allowed))
    return list(dict.fromkeys(recipes.text(case) for case in cases if case["scorer"] != NONE))


EACH = evicting(1)
PAIRS = [pytest.param(r, marks=pytest.mark.full) for r in evicting(2) if r not in EACH]
EVICTING = [*EACH, *PAIRS]
ALL = [*registered("format"), *EVICTING]


def by_turns(settings: list, of: int) -> list:
    """Every evicting recipe in one of `of` of the settings; the full product has them in all."""
    cases = []
    for i, recipe in enumerate(EVICTING):
        text, marks = (recipe, ()) if isinstance(recipe, str) else (*recipe.values, recipe.marks)
        for j, setting in enumerate(settings):
            later = [pytest.mark.full] if (i + j) % of else []
            name = "-".join([*map(str, setting), recipes.short(text)])
            cases.append(pytest.param(text, *setting, marks=[*marks, *later], id=name))
    return cases


def make(model, recipe, budget=f"{CAPACITY}tok", **kw):
    parsed = Recipe.parse(recipe)
    takes = parsed.evicts and parsed.scorer.capacity is None
    return CompressedCache(model, recipe, budget if takes else None, **kw)


# more tokens one by one than the longest schedule waits for (every=16, slack=4)
STEPS = 24


def stepwise(model, cache, ids, mask=None, chunk=40, steps=STEPS):
    """Chunks, then tokens, yielding the logits of each forward; masks grow as generate's do."""
    n = ids.shape[1]
    edges = [*range(0, n - steps, chunk), *range(n - steps, n), n]
    for start, stop in itertools.pairwise(edges):
        extra = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            extra = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        yield model(ids[:, start:stop], past_key_values=cache, **extra).logits


@pytest.mark.oldest
@pytest.mark.parametrize("recipe", ["none", "dense", "dense(rope='pre')"])
def test_dense_formats_equal_dynamic_cache(recipe):
    _check_full(recipe, None)


@pytest.mark.parametrize("recipe", EVICTING, ids=recipes.short)
@pytest.mark.parametrize("budget", ["100000tok", "1GiB"])
def test_full_budget_equals_dynamic_cache(recipe, budget):
    """Where nothing has to go, only the format could make a difference, and so it is left out."""
    exact = dataclasses.replace(Recipe.parse(recipe), format=None)
    _check_full(exact, budget)


def _check_full(recipe, budget):
    model, plain = build("llama"), build("llama")
    cache = make(model, recipe, budget)
    got = generate(model, cache, tokens(200), n=20)
    want = generate(plain, DynamicCache(config=plain.config), tokens(200), n=20)
    assert cache.stats().evicted == 0
    assert torch.equal(got.sequences, want.sequences)
    spread = torch.stack(want.logits).abs().max()
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() < 1e-4 * spread


@pytest.mark.parametrize("recipe", ALL, ids=recipes.short)
def test_left_padded_equals_unpadded_and_rows_are_independent(recipe):
    _check_rows(recipe, "entries")


@pytest.mark.parametrize(("recipe", "kind"), by_turns([("bytes",), ("percent",)], 2))
def test_rows_share_a_budget_in_bytes_without_touching_each_other(recipe, kind):
    _check_rows(recipe, kind)


def _check_rows(recipe, kind):
    model = build("llama")
    lengths = [230, 170, 101]
    ids, mask = left_padded(lengths)

    def cache(rows):
        budget = recipes.budget_for(model, recipe, kind, rows, tokens=230)
        return CompressedCache(model, recipe, budget)

    with contests() as shared:
        batch = list(stepwise(model, cache(3), ids, mask))
    for row, n in enumerate(lengths):
        # alone, with the same chunk edges: a chunk sees its own tokens exactly
        with contests() as own:
            alone = _alone(model, cache(1), ids[row : row + 1], mask[row : row + 1], n)
        together = torch.cat([out[row] for out in batch])[-n:]
        if not _same_row(recipe, ids[row : row + 1], mask[row : row + 1], together, alone):
            assert any(x[row] for x in shared) or any(x[0] for x in own), f"row {row} of {lengths}"
            # rounding chose another entry, but not before the budget was used up (a percentage is at once)
            start = 20 if kind == "percent" else CAPACITY
            error = (together[:start] - alone[:start]).abs().max()
            assert error < 2e-3 * alone[:start].abs().max(), f"row {row} of {lengths}"


def _same_row(recipe, ids, mask, together, alone):
    error = (together - alone).abs().max()
    if error < 2e-3 * alone.abs().max():
        return True
    # a code that rounds the other way: little of what the recipe does
    fmt = Recipe.parse(recipe).format
    if fmt is None or fmt == Dense():
        return False
    plain = build("llama")
    dense = _alone(plain, DynamicCache(config=plain.config), ids, mask, len(alone))
    # one step of a code of 2 bits is a third of its range
    share = 0.2 if fmt.layout(16, 16, torch.float32).bits("key", 16) < 5 else 0.05
    return error < share * (alone - dense).abs().max()


def _alone(model, cache, ids, mask, n):
    """The row without its padding, cut where the padded batch is cut."""
    pads = ids.shape[1] - n
    outs = []
    edges = [*range(0, ids.shape[1] - STEPS, 40), *range(ids.shape[1] - STEPS, ids.shape[1])]
    for i, start in enumerate(edges):
        stop = edges[i + 1] if i + 1 < len(edges) else ids.shape[1]
        start, stop = max(start, pads), max(stop, pads)
        if stop == start:
            continue
        outs.append(model(ids[:, start:stop], past_key_values=cache).logits[0])
    return torch.cat(outs)


@pytest.mark.parametrize(
    ("recipe", "kind", "second"),
    by_turns([(kind, second) for second in (400, 260) for kind in recipes.BUDGETS], 3),
)
def test_ceiling_holds_after_every_forward(recipe, kind, second):
    model = build("llama")
    budget = recipes.budget_for(model, recipe, kind, rows=2, tokens=400)
    cache = CompressedCache(model, recipe, budget)
    ids, mask = left_padded([400, second])
    for _ in stepwise(model, cache, ids, mask, chunk=64, steps=2 * STEPS):
        for layer in cache.layers:
            _check_lengths(layer.store)
        assert cache.nbytes <= cache.ceiling()
        if kind == "bytes":
            assert cache.nbytes <= budget
    stats = cache.stats()
    assert stats.evicted > 0 and stats.compressions > 0


def _check_lengths(store):
    """No head holds more entries than the schedule's peak; pooled heads, not more together."""
    held, peak = store.stored, store.plan.recipe.schedule.peak(store.capacity())
    if store.plan.pools:
        held, peak = held.sum(1), peak.sum(1)
    assert bool((held <= peak).all()), (held, peak)


@pytest.mark.parametrize(("recipe", "share"), by_turns([(30,), (75,)], 2))
def test_a_percentage_is_of_a_16_bit_dense_cache(recipe, share):
    model = build("llama", dtype=torch.bfloat16)
    cache = CompressedCache(model, recipe, f"{share}%")
    # heads that share what they hold each need room for one more page
    allocator = cache.recipe.allocator
    n = 1400 if allocator is not None and allocator.pools else 700
    for _ in stepwise(model, cache, tokens(n), chunk=100):
        dense = 3 * 2 * (16 + 16) * 2 * cache.get_seq_length()
        assert cache.nbytes <= max(share / 100 * dense, cache.floor())
    # the bytes are used, though pages of 64 are coarse for budgets of a few hundred entries, and
    # what went while the budget was small does not come back
    if share == 30:
        assert cache.nbytes > share / 100 * dense / 3.5


def reachable_tensors(root):
    """Every tensor that an object keeps alive, the model aside."""
    seen, queue, found = set(), [root], []
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, (Host, type, ModuleType, FunctionType, MethodType)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
            continue
        queue += gc.get_referents(item)
    return found


@pytest.mark.parametrize("recipe", ALL, ids=recipes.short)
def test_nbytes_is_the_sum_of_unique_live_storages(recipe):
    model = build("llama")
    cache = make(model, recipe)
    for _ in stepwise(model, cache, tokens(300, rows=2), chunk=90, steps=20):
        pass
    tensors = reachable_tensors([layer.store for layer in cache.layers])
    # what a plan derives once for all (frequencies, shares) belongs to the recipe, not to the cache
    static = {id(t) for layer in cache.layers for t in reachable_tensors(layer.store.plan)}
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors if id(t) not in static and t.untyped_storage().nbytes()
    }  # fmt: skip
    assert cache.nbytes == sum(storages.values())
    stats = cache.stats()
    assert stats.nbytes == sum(stats.by_part.values()) == cache.nbytes
    json.dumps(stats.to_dict())


@pytest.mark.parametrize("recipe", EVICTING, ids=recipes.short)
def test_masses_sum_to_tokens(recipe):
    """Every token seen is in some entry's mass, or counted as evicted where nothing merges."""
    model = build("llama")
    cache = make(model, recipe)
    ids, mask = left_padded([300, 210])
    for _ in stepwise(model, cache, ids, mask):
        for layer in cache.layers:
            store = layer.store
            held, seen = _mass(store), store.seen[:, None].double().expand(store.stored.shape)
            counters, merger = store.counters, store.plan.merger
            if merger is not None and merger.conserves and counters.merged == counters.evicted:
                assert torch.allclose(held, seen, rtol=1e-4), (held, seen)
            elif merger is None:
                assert int((seen - held).sum()) == counters.evicted
            assert (held <= seen * (1 + 1e-4)).all()
    stats = cache.stats()
    assert stats.evicted > 0
    assert stats.merged <= stats.evicted
    assert bool(stats.merged) == bool(cache.recipe.merger and cache.recipe.merger.name != "drop")


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("merger", registered("merger"), ids=recipes.short)
def test_mergers_with_masses_lose_less_than_dropping(merger, fmt):
    """Mass that is lost: tokens that no entry stands for any more.

    `mass_fold` and centroids keep it: all of it where nothing sealed, sampled out or too unlike is in the
    way. `drop` keeps none. `nearest`, `cam`, `d2o` and `refit` move values, and some keys; an entry
    still attends like one token, so that they lose as much mass as dropping.
    """
    cache = _after_300(f"h2o | {merger} | {fmt}")
    for layer, dropped in zip(cache.layers, _dropped(fmt), strict=True):
        store, counters, chosen = layer.store, layer.store.counters, cache.recipe.merger
        lost = _lost(store)
        has_mass = store.centroids is not None or "mass" in chosen.state_names
        if not has_mass or not chosen.serves(layer.index):
            assert float(lost) == pytest.approx(counters.evicted)
            assert (counters.merged > 0) == (chosen.name != "drop" and chosen.serves(layer.index))
        elif chosen.conserves and counters.merged == counters.evicted:
            assert abs(float(lost)) < 1e-4 * int(store.seen.sum())
        else:
            assert lost < dropped, (float(lost), float(dropped))


def _after_300(recipe):
    model = build("llama")
    cache = make(model, recipe)
    for _ in stepwise(model, cache, tokens(300)):
        pass
    return cache


@functools.cache
def _dropped(fmt):
    """What each layer has lost where nothing merges."""
    stores = [layer.store for layer in _after_300(f"h2o | {fmt}").layers]
    lost = [float(_lost(store)) for store in stores]
    assert all(n > 0 for n in lost)
    assert lost == pytest.approx([store.counters.evicted for store in stores])
    return lost


def _lost(store):
    return (store.seen[:, None] - _mass(store)).sum()


def _mass(store):
    """Tokens that the entries of each head stand for."""
    entries = entries_of(store)
    each = torch.exp(entries.meta["mass"]) if "mass" in entries.meta else entries.valid.double()
    mass = (each.double() * entries.valid).sum(-1)
    mass += 0 if store.sinks is None else store.sinks.count
    if store.centroids is not None:
        n = store.centroids.longest
        used = store.centroids.valid(n)
        mass += (store.centroids.meta["mass"][:, :, :n].exp() * used).sum(-1).double()
    return mass


@pytest.mark.parametrize("recipe", ALL, ids=recipes.short)
def test_deterministic(recipe):
    model = build("llama")
    runs = [torch.cat(list(stepwise(model, make(model, recipe), tokens(200))), 1) for _ in "ab"]
    assert torch.equal(*runs)


@pytest.mark.parametrize("recipe", ALL, ids=recipes.short)
def test_copy_and_reset(recipe):
    model = build("llama")
    cache, ids = make(model, recipe), tokens(260)
    list(stepwise(model, cache, ids[:, :200]))
    twin = copy.deepcopy(cache)
    assert twin.nbytes == cache.nbytes
    first = torch.cat(list(stepwise(model, cache, ids[:, 200:])), 1)
    second = torch.cat(list(stepwise(model, twin, ids[:, 200:])), 1)
    assert torch.equal(first, second)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    fresh = make(model, recipe)
    again = torch.cat(list(stepwise(model, cache, ids)), 1)
    assert torch.equal(again, torch.cat(list(stepwise(model, fresh, ids)), 1))


@pytest.mark.parametrize("name", sorted(registry.policies()))
def test_text_round_trips(name):
    cls = registry.policies()[name]
    policy = cls()
    assert policy.name == name
    assert cls.__doc__ and cls.__doc__.strip(), f"{name} has no docstring"
    for changed in [policy, *changes(policy)]:
        recipe = Recipe.of(*_before(policy), changed)
        assert Recipe.parse(str(recipe)) == recipe


def _before(policy):
    """What must stand beside a policy: most kinds act on evicted entries."""
    return [] if policy.kind in ("scorer", "format") else [registry.policies("scorer")["h2o"]()]


# a parameter that some policies refuse unless another one makes use of it
WAITS = {"group": {"keys": "channel"}, "seed": {"hadamard": "keys"}}


def changes(policy):
    """The policy with each of its parameters changed in turn, to whatever value it accepts."""
    for field in dataclasses.fields(policy):
        default = getattr(policy, field.name)
        beside = [{}, WAITS[field.name]] if field.name in WAITS else [{}]
        given = [{field.name: value, **other} for value in _others(default) for other in beside]
        accepted = [p for parameters in given if (p := _changed(policy, parameters))]
        # a parameter that is a word has words that cannot be guessed
        assert accepted or isinstance(default, str), f"{policy.name}.{field.name}={default!r}"
        yield from accepted


def _others(default):
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1, default + 16, default * 2, max(1, default // 2)]
    if isinstance(default, float):
        return [default / 3, default + 0.3, default * 7]
    if isinstance(default, tuple):
        return [default * 2]
    return [1, 3, 0.3, True, "x", (1.0, 2.0), (0, 1)] if default is None else []


def _changed(policy, parameters):
    try:
        return dataclasses.replace(policy, **parameters)
    except (ValueError, TypeError):
        return None


@pytest.mark.parametrize("text", registered("allocator"))
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 4), (3, 2), (32, 8)])
def test_allocators_share_out_all_there_is(text, layers, heads):
    h2o = registry.policies("scorer")["h2o"]()
    allocator = (Recipe.of(h2o) | Recipe.parse(f"h2o | {text}").allocator).allocator
    shares = allocator.shares(layers, heads)
    assert shares.shape == (layers, heads) and shares.dtype == torch.float64
    assert bool((shares > 0).all()) and float(shares.mean()) == pytest.approx(1)
    if not allocator.pools:
        return
    scores = torch.randn(3, heads, 50, generator=torch.Generator().manual_seed(0))
    scores[:, :, -2:] = float("inf")  # the newest are protected
    valid = torch.ones_like(scores, dtype=torch.bool)
    valid[1, :, 7:40] = False
    scores = scores.masked_fill(~valid, float("-inf"))
    total = torch.tensor([11 * heads, 12 * heads, 2 * heads])
    split = allocator.split(scores, valid, total)
    assert bool((split >= 2).all()), "a head gives up protected entries"
    assert torch.equal(split.sum(1), total)


def chains():
    """Random valid recipes, with parameters away from their defaults."""
    kinds = {kind: [c() for c in registry.policies(kind).values()] for kind in FACTORS}
    changed = {kind: [*ps, *(q for p in ps for q in changes(p))] for kind, ps in kinds.items()}
    scorer = st.sampled_from(changed["scorer"])
    optional = [st.none() | st.sampled_from(changed[kind]) for kind in FACTORS if kind != "scorer"]
    return st.tuples(scorer, *optional).map(lambda ps: Recipe.of(*(p for p in ps if p is not None)))


@given(chains())
@settings(max_examples=100, deadline=None)
def test_any_recipe_round_trips(recipe):
    assert Recipe.parse(str(recipe)) == recipe

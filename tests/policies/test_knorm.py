"""KnormPress from the authors' rule, in loops: how many stay, and which."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.entries import Entries
from kvloom.policies.evict.knorm import Knorm
from tests.models import build, generate, tokens
from tests.policies.brute import best, check_keeps
from tests.policies.replay import forward_edges, run

# Norms are those of arrival, whatever a format makes of the keys. Rotation preserves them, so a
# token has the same norm wherever it stands; norms are compared to 16 bits.
EXACT = {"ties": 2**-15, "stored": False}


def norms(sign=-1):
    def scores(layer, heads, h):
        return [sign * math.sqrt(float(k @ k)) for k in heads[h].keys]

    return scores


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(
    ("recipe", "sign", "window", "sinks"),
    [
        ("knorm", -1, 0, 0),
        ("knorm | int4", -1, 0, 0),  # norms are those from before quantization
        ("knorm(keep='high')", 1, 0, 0),
        ("knorm(recent_fraction=0.5)", -1, 35, 0),
        ("knorm(recent_fraction=0.5, sinks=4) | int4", -1, 33, 4),
    ],
)
def test_a_budget_of_low_norms(recipe, sign, window, sinks, lengths):
    check_keeps(recipe, norms(sign), 70, window=window, sinks=sinks, lengths=lengths, **EXACT)


def ruled(rule, fraction=0.0, sinks=0):
    """`choose` for a rule `(length, seen, new) -> how many stay`; lengths include the sinks."""

    def choose(scores, counts):
        chosen = []
        for s, n in zip(scores, counts, strict=True):
            goal = min(n, max(0, rule(n + sinks) - sinks))
            chosen.append(best(s, goal, int(fraction * goal)) if goal < n else list(range(n)))
        return chosen

    return choose


RECURRENT = [(0.9, 50), (0.7, 32), (0.4, 80), (1.0, 1)]


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(("r", "P"), RECURRENT[:3])
def test_recurrent_prunes_after_every_forward(r, P, lengths):
    rule = ruled(lambda n: math.ceil(r * n) if n >= P else n)
    recipe = f"knorm(mode='recurrent', keep_ratio={r}, prune_after={P})"
    check_keeps(recipe, norms(), None, choose=rule, lengths=lengths, **EXACT)


def test_recurrent_with_everything_that_may_be_added():
    rule = ruled(lambda n: math.ceil(0.8 * n) if n >= 40 else n, fraction=0.5, sinks=4)
    recipe = "knorm(mode='recurrent', keep_ratio=0.8, prune_after=40, recent_fraction=0.5, sinks=4)"
    check_keeps(f"{recipe} | int4", norms(), None, choose=rule, sinks=4, **EXACT)


def lengths_of(recipe, edges, layer=1):
    model, lengths = build("llama"), []
    cache = CompressedCache(model, recipe)
    for _ in run(model, cache, tokens(edges[-1]), edges):
        lengths.append(int(cache.layers[layer].store.stored.max()))
    assert cache.ceiling() is None
    return lengths


@pytest.mark.parametrize(("r", "P"), RECURRENT)
def test_recurrent_saws_between_r_p_and_p(r, P):
    """Each step above the threshold multiplies the length: the footprint is P, whatever r is."""
    recipe = f"knorm(mode='recurrent', keep_ratio={r}, prune_after={P})"
    got = lengths_of(recipe, [0, 300, *range(301, 421)])
    want, n = [], 0
    for new in [300, *[1] * 120]:
        n += new
        n = math.ceil(r * n) if n >= P else n
        want.append(n)
    assert got == want
    if r < 1:
        assert max(got[60:]) < P and min(got[60:]) == math.ceil(r * P)


@pytest.mark.parametrize("edges", [[0, 200], [0, 64, 128, 192, 200], [0, 3, 199, 200]])
@pytest.mark.parametrize("r", [0.9, 0.5])
def test_once_keeps_the_true_ratio_of_the_prompt(edges, r):
    """However the prompt was cut; the last cut is a single token, which only a prompt's end is."""
    single = edges[-1] - edges[-2] == 1
    got = lengths_of(
        f"knorm(mode='once', keep_ratio={r}, prune_after=100)", [*edges, *range(201, 231)]
    )
    prompt = math.ceil(r * edges[-2]) + 1 if single else math.ceil(r * 200)
    assert got[len(edges) - 2 :] == [prompt + i for i in range(31)]


def test_once_counts_a_second_turn_and_leaves_short_prompts_alone():
    recipe = "knorm(mode='once', keep_ratio=0.5, prune_after=100)"
    assert lengths_of(recipe, [0, 99, 100]) == [99, 100]
    turns = lengths_of(recipe, [0, 120, *range(121, 141), 200])
    assert turns == [*range(60, 81), 100]


def test_once_keeps_the_lowest_norms_of_what_is_there():
    """A prompt of 80 and a chunk of 17 are cut to half of all seen; single tokens are only added."""
    halves = {80: 40, 40 + 17: math.ceil(97 / 2)}
    recipe = "knorm(mode='once', keep_ratio=0.5, prune_after=30)"
    edges = forward_edges(102, 80, 17)
    rule = ruled(lambda n: halves.get(n, n))
    check_keeps(recipe, norms(), None, choose=rule, edges=edges, **EXACT)


def test_norms_that_differ_by_rounding_are_equal():
    norm = torch.tensor([[[1.5, 1.5000002, 1.4999998, 1.5003, 0.7]]])
    entries = Entries(torch.ones(1, 1, 5, dtype=torch.bool), {"norm": norm}, None, None)
    low, high = Knorm().score(entries).flatten().tolist(), Knorm(keep="high").score(entries)
    assert low[0] == low[1] == low[2] > low[3] and low[4] > low[0]
    assert high.flatten().tolist() == [-x for x in low]
    assert abs(low[3] + 1.5003) <= 1.5003 * 2**-17


@pytest.mark.parametrize(
    "recipe",
    [
        "knorm(skip_layers=(0, 2))",
        "knorm(mode='recurrent', keep_ratio=0.5, prune_after=40, skip_layers=(0, 2))",
    ],
)
def test_skipped_layers_keep_everything(recipe):
    model = build("llama")
    cache = CompressedCache(
        model, recipe, None if "mode" in recipe else "60tok", track_positions=True
    )
    generate(model, cache, tokens(100), n=21)
    for layer in (0, 2):
        assert cache.positions(layer) == [[list(range(120))] * 2]
    assert all(len(head) <= 60 for head in cache.positions(1)[0])
    assert cache.ceiling() is None


def test_a_budget_without_skipped_layers_has_a_ceiling():
    model = build("llama")
    cache = CompressedCache(model, "knorm", "60tok")
    generate(model, cache, tokens(100), n=21)
    assert cache.nbytes <= cache.ceiling()


@pytest.mark.parametrize(
    ("recipe", "budget", "rule"),
    [
        ("knorm(mode='recurrent')", "512tok", "leave out budget '512tok'"),
        ("knorm(mode='once') | lazy(every=8)", None, r"leave out lazy\(every=8\)"),
        ("knorm(mode='once') | ada", None, "leave out ada"),
        ("knorm", None, "evicts down to a budget and none was given"),
        ("knorm(skip_layers=(0,))", "50%", "no number of bytes holds"),
        ("knorm(skip_layers=(0,))", "1MiB", "no number of bytes holds"),
        ("knorm(skip_layers=(1, 3))", "50tok", r"exempts layers \[3\], but 3 are compressed"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_token(recipe, budget, rule):
    with pytest.raises(ValueError, match=rf"knorm.*{rule}"):
        CompressedCache(build("llama"), recipe, budget)


def test_unequal_layers_do_not_fit_dense_tensors():
    with pytest.raises(ValueError, match="budgets that differ between layers or heads"):
        CompressedCache(build("llama"), "knorm(skip_layers=(0,))", "50tok", attention="dense")


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "twice"}, {"keep_ratio": 0.0, "mode": "once"}, {"keep_ratio": 1.1, "mode": "once"},
        {"prune_after": 0, "mode": "once"},
        {"skip_layers": (-1,)}, {"skip_layers": [0]}, {"keep": "middle"},
        {"recent_fraction": 1.5}, {"sinks": -1},
    ],
)  # fmt: skip
def test_bad_parameters_are_restated(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=rf"knorm\(.*{name}=.*: .*{name}"):
        Knorm(**bad)

"""Expected Attention from the paper, in float64 matrices: Gaussian queries, mean future rotation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.entries import Entries
from kvloom.core.policy import Queries
from kvloom.policies.evict.expected_attention import ExpectedAttention
from kvloom.positions import RopeSpec
from tests.models import build, tokens
from tests.policies.brute import check_keeps

D = 16
FREQUENCIES = [10000.0 ** (-2 * i / D) for i in range(D // 2)]


def rotation(position):
    """The matrix that rotates a query of the tests' Llama to a position."""
    R = torch.zeros(D, D, dtype=torch.float64)
    for i, frequency in enumerate(FREQUENCIES):
        c, s, j = math.cos(position * frequency), math.sin(position * frequency), i + D // 2
        R[i, i], R[i, j], R[j, i], R[j, j] = c, -s, s, c
    return R


TURNS = [rotation(p) for p in range(200)]


def expected(n_future, sinks, covariance=True, value_norm=True, half_life=None):
    def scores(layer, heads, h):
        head, total = heads[h], 0.0
        if not head.keys:
            return []
        turn = sum(TURNS[head.seen + i] for i in range(n_future)) / n_future
        keys, norms = torch.stack(head.keys), [float(v @ v) ** 0.5 for v in head.values]
        counted = range(sinks, head.seen)
        weights = [0.5 ** ((head.seen - 1 - t) / half_life) if half_life else 1.0 for t in counted]
        for g in range(head.queries[0].shape[0]):
            plain = [TURNS[t].T @ head.queries[t][g] for t in counted]
            mean = sum(w * q for w, q in zip(weights, plain, strict=True)) / sum(weights)
            apart = [q - mean for q in plain]
            spread = sum(w * torch.outer(a, a) for w, a in zip(weights, apart, strict=True)) / sum(
                weights
            )
            ahead, around = turn @ mean, turn @ spread @ turn.T
            logits = [float(k @ ahead) / math.sqrt(D) for k in keys]
            if covariance:
                logits = [
                    z + float(k @ around @ k) / (2 * D) for z, k in zip(logits, keys, strict=True)
                ]
            exps = [math.exp(z - max(logits)) for z in logits]
            total = (
                total
                + torch.tensor(exps, dtype=torch.float64) / sum(exps) / head.queries[0].shape[0]
            )
        norms = norms if value_norm else [1.0] * len(norms)
        return [float(s) * n for s, n in zip(total, norms, strict=True)]

    return scores


CASES = [
    ({}, 0),
    ({"n_future": 7, "sinks": 0, "covariance": False}, 0),
    ({"n_future": 1, "sinks": 9, "value_norm": False}, 0),
    ({"n_future": 20, "half_life": 15}, 0),
    ({"n_future": 20, "recent_fraction": 0.25}, 16),
]


PADDED = [110, 31, 80]


@pytest.mark.parametrize(
    ("given", "window", "lengths"),
    [*((*case, None) for case in CASES), (*CASES[0], PADDED)]
    + [pytest.param(*case, PADDED, marks=pytest.mark.full) for case in CASES[1:]],
)
def test_keeps_what_the_paper_keeps(given, window, lengths):
    given = {"n_future": 64, **given}
    text = ", ".join(f"{k}={v!r}" for k, v in given.items())
    paper = {"sinks": 4, **{k: v for k, v in given.items() if k != "recent_fraction"}}
    sinks = paper["sinks"]
    check_keeps(
        f"expected_attention({text})",
        expected(**paper),
        70,
        sinks=sinks,
        window=window,
        lengths=lengths,
    )


def test_keeps_what_the_paper_keeps_in_packed_pages():
    check_keeps("expected_attention(n_future=30) | int4", expected(30, 4), 90, sinks=4)


def test_epsilon_is_added_before_the_norm():
    """With it, entries of no expected attention are ranked by their values."""
    keys, values = torch.randn(1, 2, 9, D), torch.randn(1, 2, 9, D)
    frequencies = torch.tensor(FREQUENCIES)
    valid = torch.ones(1, 2, 9, dtype=torch.bool)
    memory = statistics(
        ExpectedAttention(), torch.randn(1, 2, 3, 30, D), valid[:, 0, :1].expand(1, 30), [0, 30]
    )
    entries = Entries(valid, {}, lambda: keys, lambda: values, memory=memory, scale=0.25)
    entries.rope = RopeSpec(frequencies, D)
    plain, added = (ExpectedAttention(epsilon=e).score(entries) for e in (0.0, 0.02))
    torch.testing.assert_close(added - plain, 0.02 * values.norm(dim=-1))


def statistics(scorer, states, valid, edges):
    memory = {}
    positions = (valid.cumsum(-1) - 1).clamp_min(0)
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        memory = scorer.remember(
            memory, Queries(states[..., part, :], positions[:, part], valid[:, part])
        )
    return memory


@pytest.mark.parametrize("half_life", [None, 40])
def test_statistics_do_not_depend_on_chunks_or_padding(half_life):
    """Against fp64 over all tokens at once; large means, where naive sums of squares would fail."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 2, 3, 300, 8, generator=generator) + 30
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :120] = False
    scorer = ExpectedAttention(half_life=half_life)
    for edges in ([0, 300], [0, 1, 2, 3, 100, 101, 280, *range(281, 301)], [0, 150, 300]):
        memory = statistics(scorer, states, valid, edges)
        for row, first in enumerate((4, 124)):
            x = states[row, :, :, first:].double()
            age = torch.arange(x.shape[2] - 1, -1, -1).double()
            w = 0.5 ** (age / half_life) if half_life else torch.ones_like(age)
            w = w / w.sum()
            mean = torch.einsum("hgqd,q->hgd", x, w)
            apart = x - mean[:, :, None]
            covariance = torch.einsum("hgqd,hgqe,q->hgde", apart, apart, w)
            rounding = 300 * torch.finfo(torch.float32).eps
            assert (memory["mean"][row] - mean).abs().max() < rounding * 30
            assert (memory["covariance"][row] - covariance).abs().max() < rounding * 30
            assert int(memory["next"][row]) == 300 - (first - 4)


@pytest.mark.parametrize("covariance", [True, False])
def test_what_is_remembered_is_counted(covariance):
    model = build("llama")
    cache = CompressedCache(model, f"expected_attention(covariance={covariance})", "50tok")
    model(tokens(80, rows=2), past_key_values=cache)
    per_row = 4 * 16 * 4 + (4 * 16 * 16 * 4 if covariance else 0) + 3 * 8
    assert cache.stats().by_part["query memory"] == 3 * 2 * per_row
    assert cache.nbytes <= cache.ceiling()


@pytest.mark.parametrize(
    "bad",
    [
        {"n_future": 0}, {"n_future": 2.0}, {"sinks": -1}, {"covariance": 0}, {"value_norm": None},
        {"epsilon": -1.0}, {"epsilon": float("nan")}, {"half_life": 0}, {"recent_fraction": 2},
    ],
)  # fmt: skip
def test_bad_parameters_are_restated(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"expected_attention\({name}=.*: {name}"):
        ExpectedAttention(**bad)

"""TOVA from the paper, in loops: the last token's softmax, averaged over all heads."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.policy import Queries
from kvloom.policies.evict.tova import TOVA
from tests.models import build, tokens
from tests.policies.brute import check_keeps


def softmax(query, keys):
    logits = [float(query @ k) / math.sqrt(k.numel()) for k in keys]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def own(layer, heads, h):
    """Mean over the query heads of one KV head."""
    head = heads[h]
    each = [softmax(q, head.keys) for q in head.queries[-1]]
    return [sum(column) / len(each) for column in zip(*each, strict=True)]


def layerwide(layer, heads, h):
    """By token, since unequal budgets let heads hold different ones."""
    totals = {}
    for i, head in enumerate(heads):
        for position, x in zip(head.positions, own(layer, heads, i), strict=True):
            totals[position] = totals.get(position, 0.0) + x / len(heads)
    return [totals[p] for p in heads[h].positions]


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize("recipe", ["tova", "tova | int4"])
def test_keeps_what_the_paper_keeps(recipe, lengths):
    layers = check_keeps(recipe, layerwide, 70, window=1, lengths=lengths)
    for rows in layers:
        for first, second in rows:
            assert first.positions == second.positions
    kept = [head.positions for rows in layers for row in rows for head in row]
    assert any(p[0] < p[-1] - 70 for p in kept)  # no sliding window


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
def test_each_head_for_itself(lengths):
    layers = check_keeps("tova(per_head=True)", own, 70, window=1, lengths=lengths)
    assert any(a.positions != b.positions for rows in layers for a, b in rows)


def test_heads_of_unequal_budgets_average_token_by_token():
    sizes = [30, 60]

    def choose(scores, counts):
        chosen = []
        for s, n, size in zip(scores, counts, sizes, strict=True):
            rest = sorted(range(n - 1), key=lambda j: (s[j], j), reverse=True)
            chosen.append([*rest[: min(size, n) - 1], n - 1])
        return chosen

    recipe = "tova | weighted(heads=(1.0, 2.0))"
    layers = check_keeps(recipe, layerwide, 45, choose=choose)
    small, large = layers[0][0]
    assert len(small.positions) == 30 and len(large.positions) == 60


def test_remembers_one_query_of_each_row():
    memory, last = {}, [None, None]
    for valid in ([[0, 0], [0, 1]], [[1, 0], [1, 1]], [[0, 0], [1, 0]]):
        valid = torch.tensor(valid, dtype=torch.bool)
        states = torch.randn(2, 1, 1, 2, 4)
        memory = TOVA().remember(memory, Queries(states, torch.zeros(2, 2), valid))
        for row in range(2):
            for q in valid[row].nonzero().flatten().tolist():
                last[row] = states[row, :, :, q : q + 1]
            assert int(memory["held"][row]) == (last[row] is not None)
            assert last[row] is None or torch.equal(memory["queries"][row], last[row])


def test_what_is_remembered_is_counted():
    model = build("llama")
    cache = CompressedCache(model, "tova", "50tok")
    model(tokens(80, rows=2), past_key_values=cache)
    assert cache.stats().by_part["query memory"] == 3 * 2 * (4 * 16 * 4 + 8)


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=r"tova\(per_head=.*: per_head must be True or False"):
        TOVA(per_head=bad)

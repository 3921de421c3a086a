"""SnapKV from the paper, in loops: the window's softmax, summed, pooled, ranked; and the window."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.entries import Entries
from kvloom.core.policy import Queries
from kvloom.policies.evict import _attention
from kvloom.policies.evict.snapkv import SnapKV
from tests.models import build, tokens
from tests.policies.brute import check_keeps
from tests.policies.replay import run


def snap(window, kernel, pooling, cap=None):
    """Each query head by itself: sum of its window's attention before the window, then the pool."""

    def pooled(column, j):
        around = [
            column[i] if 0 <= i < len(column) else 0.0
            for i in range(j - kernel // 2, j + kernel // 2 + 1)
        ]
        return sum(around) / kernel if pooling == "avg" else max(around)

    def scores(layer, heads, h):
        head = heads[h]
        n, newest = len(head.keys), head.queries[-window:]
        total = [0.0] * n
        for g in range(newest[0].shape[0]):
            column = [0.0] * n
            for back, query in enumerate(reversed(newest)):
                visible = n - back
                logits = [float(query[g] @ k) / math.sqrt(k.numel()) for k in head.keys[:visible]]
                logits = logits if cap is None else [cap * math.tanh(x / cap) for x in logits]
                weights = [math.exp(x - max(logits)) for x in logits]
                for j, w in enumerate(weights):
                    column[j] += w / sum(weights) / len(newest)
            column = column[: max(0, n - window)]
            for j in range(len(column)):
                total[j] += pooled(column, j) / newest[0].shape[0]
        return total

    return scores


CASES = [(32, 5, "avg"), (8, 7, "max"), (1, 1, "avg"), (16, 3, "avg")]


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(("window", "kernel", "pooling"), CASES)
def test_keeps_what_the_paper_keeps(window, kernel, pooling, lengths):
    recipe = f"snapkv(window={window}, kernel={kernel}, pooling={pooling!r})"
    check_keeps(recipe, snap(window, kernel, pooling), 70, window=window, lengths=lengths)


def test_keeps_what_the_paper_keeps_in_packed_pages():
    check_keeps("snapkv(window=8) | int4", snap(8, 5, "avg"), 80, window=8)


def test_one_shot_is_the_prompt_at_once():
    check_keeps("snapkv(window=16)", snap(16, 5, "avg"), 70, window=16, edges=[0, 110])


def test_a_budget_below_the_window_keeps_the_newest():
    layers = check_keeps("snapkv(window=32)", snap(32, 5, "avg"), 20, window=32)
    assert layers[1][0][1].positions == list(range(90, 110))


def test_blocks_of_queries_change_nothing(monkeypatch):
    kept = []
    for elements in (1 << 22, 1):
        monkeypatch.setattr(_attention, "_BLOCK_ELEMENTS", elements)
        model = build("gemma2")  # with a softcap
        cache = CompressedCache(model, "snapkv(window=20)", "50tok", track_positions=True)
        list(run(model, cache, tokens(90), [0, 70, 90]))
        kept.append([cache.positions(layer.layer_idx) for layer in cache.compressed])
    assert kept[0] == kept[1]


def given(keys, queries, softcap=None):
    """Entries of one head that saw as many queries as it has entries."""
    valid = torch.ones(1, 1, len(keys), dtype=torch.bool)
    states = queries[None, None, None]
    memory = SnapKV(window=3).remember({}, Queries(states, torch.zeros(1, len(keys)), valid[0]))
    entries = Entries(valid, {}, lambda: keys[None, None], lambda: None, memory=memory)
    entries.scale, entries.softcap = 0.7, softcap
    return entries


@pytest.mark.parametrize("softcap", [None, 0.4])
def test_scale_and_softcap_are_the_models(softcap):
    keys, queries = torch.randn(6, 4), torch.randn(6, 4)
    logits = queries @ keys.T * 0.7
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf).softmax(-1)[-3:]
    got = _attention.attention_from(given(keys, queries, softcap), given(keys, queries).memory)
    torch.testing.assert_close(got[0, 0, 0], weights.mean(0))


def test_holes_are_no_neighbours():
    """Dead slots between two entries change neither the softmax nor the pool."""
    keys, queries = torch.randn(9, 4), torch.randn(9, 4)
    plain = SnapKV(window=3).score(given(keys, queries))
    spread = given(keys, queries)
    at = torch.tensor([0, 1, 5, 6, 7, 11, 12, 14, 15])
    holey = torch.full((1, 1, 17, 4), 1e4)
    holey[:, :, at] = keys
    spread.valid = torch.zeros(1, 1, 17, dtype=torch.bool)
    spread.valid[:, :, at] = True
    spread.decode_keys = lambda: holey
    torch.testing.assert_close(SnapKV(window=3).score(spread)[:, :, at], plain)


def test_remembers_the_newest_valid_queries_however_they_come():
    """Chunks with padding anywhere, against lists."""
    generator = torch.Generator().manual_seed(3)
    scorer, memory, lists = SnapKV(window=5), {}, [[], [], []]
    for Q in (1, 3, 1, 7, 2, 1, 12, 1):
        states = torch.randn(3, 2, 2, Q, 4, generator=generator)
        valid = torch.rand(3, Q, generator=generator) < 0.6
        memory = scorer.remember(memory, Queries(states, torch.zeros(3, Q), valid))
        for row in range(3):
            lists[row] += [states[row, :, :, q] for q in range(Q) if valid[row, q]]
            n = min(5, len(lists[row]))
            assert int(memory["held"][row]) == n
            assert memory["queries"].shape == (3, 2, 2, 5, 4)
            if n:
                want = torch.stack(lists[row][-n:], 2)
                assert torch.equal(memory["queries"][row, :, :, 5 - n :], want)


def test_a_row_without_a_token_yet_scores_zero():
    entries = given(torch.randn(6, 4), torch.randn(6, 4))
    entries.memory = {name: torch.zeros_like(x) for name, x in entries.memory.items()}
    assert not SnapKV(window=3).score(entries).any()


@pytest.mark.parametrize(
    "bad",
    [
        {"window": 0},
        {"window": 1.0},
        {"kernel": 4},
        {"kernel": 0},
        {"kernel": 3.0},
        {"pooling": "sum"},
    ],
)
def test_bad_parameters_are_restated(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"snapkv\({name}=.*: {name}"):
        SnapKV(**bad)

"""StreamingLLM: the first S valid tokens and the newest W, step by step."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.entries import Entries
from kvloom.policies.evict.streaming_llm import StreamingLLM
from tests.models import build, left_padded, tokens
from tests.policies.replay import forward_edges, run


def kept_by_definition(seen: int, sinks: int, window: int) -> list[int]:
    return sorted({*range(min(sinks, seen)), *range(max(0, seen - window), seen)})


@pytest.mark.parametrize("positions", ["original", "in_cache"])
@pytest.mark.parametrize(
    ("sinks", "recent", "budget"),
    [(4, 12, None), (0, 9, None), (4, None, "16tok"), (1, None, "80tok")],
)
@pytest.mark.parametrize("lengths", [None, [60, 23, 41]])
def test_keeps_sinks_and_the_newest(positions, sinks, recent, budget, lengths):
    model = build("llama")
    recipe = f"streaming_llm(sinks={sinks}, recent={recent}, positions={positions!r})"
    cache = CompressedCache(model, recipe, budget, track_positions=True)
    window = recent if recent is not None else int(budget[:-3]) - sinks
    ids, mask = (tokens(60), None) if lengths is None else left_padded(lengths)
    for _, stop in run(model, cache, ids, forward_edges(60, 3, 30), mask):
        for layer in range(3):
            kept = cache.positions(layer)
            for row in range(len(ids)):
                seen = stop if mask is None else int(mask[row, :stop].sum())
                assert kept[row] == [kept_by_definition(seen, sinks, window)] * 2


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
def test_sealed_entries_leave_in_order(fmt):
    """Across pages: 150 entries kept of 400, far more than a tail holds."""
    model = build("llama")
    recipe = f"streaming_llm(sinks=4, recent=146, positions='original') | {fmt}"
    cache = CompressedCache(model, recipe, track_positions=True)
    edges = [0, 300, *range(310, 401, 10)]
    for _, stop in run(model, cache, tokens(400), edges):
        assert cache.positions(1) == [[kept_by_definition(stop, 4, 146)] * 2]


LAZY = [
    ("seed", 8, 0, 0),
    ("seed", 16, 15, 4),
    ("seed", 1, 0, 0),
    ("paper", 8, 4, 8),
    ("paper", 16, 15, 20),
    ("paper", 1, 0, 0),
    ("final", 8, 4, 8),
    ("final", 16, 15, 4),
    ("final", 16, 20, 4),
]


@pytest.mark.parametrize(("rule", "R", "slack", "drop"), LAZY)
def test_lazy_pruning_in_a_cache(rule, R, slack, drop):
    """The layer's counters feed the schedule: lengths equal the published rule, step by step."""
    C, S, start = 24, 4, 24
    schedule = f"lazy(every={R}, slack={slack}, max_drop={drop}, rule={rule!r})"
    model = build("llama")
    recipe = f"streaming_llm(sinks={S}, recent={C - S}, positions='original') | {schedule}"
    cache = CompressedCache(model, recipe, track_positions=True)
    L, last = 0, -(10**9)
    for _, t in run(model, cache, tokens(90), [0, *range(start, 91)]):
        L = t if L == 0 else L + 1
        if rule == "paper":
            if t % R == 0 and C + slack < L:
                L -= min(L - C, drop or L)
        elif L - C >= R:
            target = min(max(L - (drop or L), C), C + slack)
            if rule == "final":
                limit = C + slack - (R - 1)
                target = L if t - last < R else (min(target, limit) if limit >= C else C)
            last = t if target < L else last
            L = target
        assert cache.positions(0) == [[kept_by_definition(t, S, L - S)] * 2]


def test_score_is_the_order_of_arrival():
    """Counted in entries, not in slots: heads hold theirs in different places."""
    valid = torch.tensor([[[1, 1, 1, 1, 1]], [[1, 0, 1, 1, 0]]], dtype=torch.bool)
    scores = StreamingLLM().score(Entries(valid, {}, lambda: None, lambda: None))
    assert scores[0].tolist() == [[-5, -4, -3, -2, -1]]
    assert scores[1, 0, valid[1, 0]].tolist() == [-3, -2, -1]


def test_capacity_is_stated_or_left_to_the_budget():
    assert StreamingLLM(4, 60).capacity == 64
    assert StreamingLLM(4).capacity is None
    assert StreamingLLM(3).pinned == 3
    assert StreamingLLM().in_cache
    assert not StreamingLLM(positions="original").in_cache


@pytest.mark.parametrize(
    "bad", [{"sinks": -1}, {"sinks": 1.5}, {"recent": 0}, {"recent": -2}, {"positions": "slots"}]
)
def test_bad_parameters_are_restated(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"streaming_llm\({name}=.*{name}"):
        StreamingLLM(**bad)

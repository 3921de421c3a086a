"""What is forgotten after a crop is forgotten by those that remember queries, too."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.policy import Queries
from kvloom.policies.evict._attention import forget_newest, remember_newest
from tests.models import build, tokens


@pytest.mark.parametrize(
    "recipe",
    [
        "knorm | lazy(every=8) | refit(queries=8)",
        "snapkv(window=12) | lazy(every=8)",
        "tova | lazy(every=8)",
        "criticalkv(base='snapkv(window=12)') | lazy(every=8)",
    ],
)
def test_a_crop_leaves_no_trace(recipe):
    """Wrong tokens, taken back, then the right ones: as if the wrong ones had never come."""
    model, ids = build("llama"), tokens(90)
    wrong = (ids[:, :6] + 1) % 50

    def run(detours):
        cache = CompressedCache(model, recipe, "40tok")
        model(ids[:, :60], past_key_values=cache)
        logits, before = [], 0
        for i in range(60, 90):
            since = min(int(layer.store.since.min()) for layer in cache.compressed)
            if detours and since in (1, 2, 5):
                evicted = cache.stats().evicted
                for j in range(2):
                    model(wrong[:, j : j + 1], past_key_values=cache)
                assert cache.stats().evicted == evicted
                cache.crop(-2)
                before += 1
            logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1])
        assert (before > 5) == detours and cache.stats().compressions > 6
        return torch.cat(logits)

    want = run(False)
    assert (run(True) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_newest_queries_are_forgotten(n):
    """A ring of 5 that held t queries holds the older ones of them, newest last."""
    states = torch.randn(2, 1, 1, 8, 4)
    for seen in (3, 5, 8):
        real = torch.ones(2, seen, dtype=torch.bool)
        memory = remember_newest({}, Queries(states[..., :seen, :], torch.zeros(2, seen), real), 5)
        memory = forget_newest(memory, n)
        left = max(0, min(5, seen) - n)
        assert memory["held"].tolist() == [left] * 2
        want = states[..., seen - n - left : seen - n, :]
        assert left == 0 or torch.equal(memory["queries"][..., -left:, :], want)
        if n <= seen:
            back = slice(seen - n, seen)
            again = Queries(states[..., back, :], torch.zeros(2, n), real[:, back])
            memory = remember_newest(memory, again, 5)
            held = int(memory["held"][0])
            whole = states[..., seen - held : seen, :]
            assert torch.equal(memory["queries"][..., 5 - held :, :], whole)


def test_nothing_remembered_is_nothing_forgotten():
    assert forget_newest({}, 3) == {}

"""Who stays, given ranked scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core.policy import top_newest

SCORES = st.sampled_from([float("-inf"), -1.0, 0.0, 0.5, 2.0, float("inf")])  # many are equal


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), slots=st.integers(1, 12))
def test_the_best_stay_and_of_equal_ones_the_newer(data, slots):
    heads = [data.draw(st.lists(SCORES, min_size=slots, max_size=slots)) for _ in range(3)]
    target = data.draw(st.lists(st.integers(0, slots + 2), min_size=3, max_size=3))
    got = top_newest(torch.tensor([heads]), torch.tensor([target]))
    for scores, n, kept in zip(heads, target, got[0].tolist(), strict=True):
        best = sorted(range(slots), key=lambda i: (-scores[i], -i))[:n]
        assert [i for i in range(slots) if kept[i]] == sorted(best)

"""A sliding window, and nothing else."""

from __future__ import annotations

import pytest

from kvloom.policies.evict.recent import Recent
from tests.policies.brute import check_keeps


def arrival(layer, heads, h):
    return [float(p) for p in heads[h].positions]


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize(
    ("recipe", "budget", "size"), [("recent", 70, None), ("recent(window=33)", None, 33)]
)
def test_keeps_the_newest(recipe, budget, size, lengths, fmt):
    layers = check_keeps(f"{recipe} | {fmt}", arrival, budget, size=size, lengths=lengths)
    window = size or budget
    assert layers[0][0][0].positions == list(range(110 - window, 110))


def test_capacity_is_stated_or_left_to_the_budget():
    assert Recent(60).capacity == 60
    assert Recent().capacity is None
    assert not Recent().in_cache


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=rf"recent\(window={bad}\): window must be an int"):
        Recent(window=bad)

"""KeyDiff from the paper, in loops: the mean of normalised keys, and each key's cosine to it."""

from __future__ import annotations

import math

import pytest

from kvloom.policies.evict.keydiff import KeyDiff
from tests.policies.brute import check_keeps


def unlikeness(layer, heads, h):
    keys = heads[h].keys
    anchor = sum(k / math.sqrt(float(k @ k)) for k in keys) / len(keys)
    return [-float(k @ anchor) / math.sqrt(float(k @ k) * float(anchor @ anchor)) for k in keys]


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(
    ("recipe", "window"),
    [("keydiff", 0), ("keydiff(recent_fraction=0.3)", 21), ("keydiff | int4", 0)],
)
def test_keeps_what_the_paper_keeps(recipe, window, lengths):
    layers = check_keeps(recipe, unlikeness, 70, window=window, lengths=lengths)
    kept = [head.positions for rows in layers for row in rows for head in row]
    assert any(p[: len(p) // 2] != list(range(p[0], p[0] + len(p) // 2)) for p in kept)


@pytest.mark.parametrize("bad", [1.5, -0.1, "x", None])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=r"keydiff\(recent_fraction=.*must be within 0..1"):
        KeyDiff(recent_fraction=bad)

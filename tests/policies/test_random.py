"""A uniform sample that depends on seed, layer, head and position, and on nothing else."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.entries import Entries
from kvloom.policies.evict.random import Random
from tests.models import build, left_padded, tokens
from tests.policies.brute import check_keeps
from tests.policies.replay import run


def finalizer(word: int) -> int:
    """Murmur3's, in unbounded integers."""
    word &= 0xFFFFFFFF
    word ^= word >> 16
    word = word * 0x85EBCA6B & 0xFFFFFFFF
    word ^= word >> 13
    word = word * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)


def score(seed, layer, head, position):
    word = finalizer(seed)
    for part in (layer, head, position):
        word = finalizer(word ^ (part + 0x9E3779B9))
    return (word >> 8) / 2**24


def hashes(seed):
    return lambda layer, heads, h: [score(seed, layer, h, p) for p in heads[h].positions]


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(
    ("recipe", "seed", "window"),
    [
        ("random", 0, 0),
        ("random(seed=-7)", -7, 0),
        ("random(seed=3, recent_fraction=0.5) | int4", 3, 35),
    ],
)
def test_keeps_the_largest_hashes(recipe, seed, window, lengths):
    check_keeps(recipe, hashes(seed), 70, window=window, lengths=lengths)


def kept(ids, edges, seed=0, mask=None):
    model = build("llama")
    cache = CompressedCache(model, f"random(seed={seed})", "50tok")
    list(run(model, cache, ids, edges, mask))
    return [cache.positions(layer) for layer in range(3)]


def test_chunks_and_batches_change_nothing():
    whole = kept(tokens(200), [0, 200])
    assert whole == kept(tokens(200), [0, 1, 64, 150, *range(151, 201)])
    ids, mask = left_padded([260, 200])
    ids[1, 60:] = tokens(200)[0]
    both = kept(ids, [0, 100, 260], mask=mask)
    assert [layer[1] for layer in both] == [layer[0] for layer in whole]


def test_seeds_layers_and_heads_draw_anew():
    samples = [
        tuple(h) for s in (0, 1) for layer in kept(tokens(200), [0, 200], s) for h in layer[0]
    ]
    assert len(set(samples)) == 2 * 3 * 2


def test_hashes_are_uniform():
    """Chi-squared over 64 bins and 2^16 hashes: 63 degrees of freedom, 99.99 % below 119."""
    positions = torch.arange(1 << 14, dtype=torch.int32).expand(1, 4, -1)
    entries = Entries(
        torch.ones(1, 4, 1 << 14, dtype=torch.bool), {"positions": positions}, None, None
    )
    scores = Random(5).score(entries)
    counts = torch.histc(scores, 64, 0, 1)
    assert float(((counts - 1024) ** 2 / 1024).sum()) < 119
    assert float(scores.min()) >= 0 and float(scores.max()) < 1
    assert abs(float(torch.corrcoef(scores[0])[0, 1])) < 5 / 2**7  # heads: within 5 sigma of none


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": 0.5},
        {"seed": True},
        {"recent_fraction": 1.5},
        {"recent_fraction": -0.1},
        {"recent_fraction": "x"},
    ],
)
def test_bad_parameters_are_restated(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"random\({name}=.*: {name} must be"):
        Random(**bad)

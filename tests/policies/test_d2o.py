"""D2O from the paper, in loops: a threshold that moves, and means by the exponential of cosines."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom import CompressedCache
from kvloom.policies.merge.d2o import D2O
from tests.models import build, tokens
from tests.policies.groups import (
    Cell,
    cells,
    check_against,
    check_in_caches,
    check_rows,
    random_group,
)

SEEDS = range(6)


def memory(*thresholds, B=3, H=2):
    if thresholds:
        return {"threshold": torch.tensor(thresholds).view(B, H)}
    return {"threshold": torch.full((B, H), -math.inf)}


def threshold_after(cell: Cell, beta):
    old = float(cell.group.memory["threshold"][cell.row, cell.head])
    if not cell.matched:
        return old
    mean = sum(cell.nearest(j)[1] for j in cell.matched) / len(cell.matched)
    return mean if math.isinf(old) else beta * mean + (1 - beta) * old


def oracle(beta=0.5):
    def merged(cell: Cell, dtype):
        keys, values = cell.keys.to(dtype).clone(), cell.values.to(dtype).clone()
        level = threshold_after(cell, beta)
        recalled: dict[int, list[tuple[int, float]]] = {}
        for j in cell.matched:
            i, cosine = cell.nearest(j)
            if cosine >= level - 1e-6:  # a mean of one rounds
                recalled.setdefault(i, []).append((j, math.exp(cosine)))
        for i, members in recalled.items():
            total = math.e + sum(weight for _, weight in members)
            for x, source in ((keys, cell.keys), (values, cell.values)):
                x[i] = math.e / total * source[i].to(dtype)
                for j, weight in members:
                    x[i] += weight / total * source[j].to(dtype)
        return keys, values

    return merged


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("first", [True, False])
def test_equals_the_loops(seed, beta, first):
    held = memory() if first else memory(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    group = random_group(seed, memory=held)
    made = D2O(beta=beta).merge(group)
    check_against(group, made, oracle(beta))
    check_rows(D2O(beta=beta), group)
    for cell in cells(group):
        got = float(made.memory["threshold"][cell.row, cell.head])
        assert got == pytest.approx(threshold_after(cell, beta), abs=1e-6)


def test_what_is_not_alike_is_dropped():
    group = random_group(2, memory=memory(0.2, 0.2, 0.2, 0.2, 2.0, -3.0))
    made = D2O().merge(group)
    for cell in cells(group):
        level = threshold_after(cell, 0.5)
        for j in cell.matched:
            assert bool(made.folded[cell.row, cell.head, j]) == (cell.nearest(j)[1] >= level)
    assert not made.folded[2, 0].any()  # the level is above every cosine
    assert made.folded[2, 1].sum() == len(cells(group)[-1].matched) > 0  # and below


def test_a_single_first_loser_is_merged():
    """It is as alike as the mean of one: at the threshold, not below it."""
    for seed in range(20):
        group = random_group(seed, B=1, H=1, memory=memory(B=1, H=1), S=9)
        group.lost[:] = False
        group.lost[..., 4] = True
        group.kept[:] = group.open[:] = ~group.lost
        assert D2O().merge(group).folded.sum() == 1


def test_equal_losers_reach_their_own_mean():
    for n in range(2, 40):
        group = random_group(n, B=1, H=1, S=n + 1, memory=memory(B=1, H=1))
        group.keys[:, :, :n] = group.keys[:, :, :1]
        group.lost[:], group.lost[..., n] = True, False
        group.kept[:] = group.open[:] = ~group.lost
        assert D2O().merge(group).folded.sum() == n


def test_the_threshold_moves_and_beams_carry_it():
    model = build("llama")
    cache = CompressedCache(model, "h2o | d2o", "60tok")
    model(tokens(100, rows=2), past_key_values=cache)
    first = [layer.store.merger_memory["threshold"].clone() for layer in cache.compressed]
    assert all(torch.isfinite(x).all() for x in first)
    model(tokens(20, rows=2, seed=5), past_key_values=cache)
    second = [layer.store.merger_memory["threshold"].clone() for layer in cache.compressed]
    assert all((a != b).all() for a, b in zip(first, second, strict=True))
    cache.reorder_cache(torch.tensor([1, 0]))
    for layer, before in zip(cache.compressed, second, strict=True):
        assert torch.equal(layer.store.merger_memory["threshold"], before[[1, 0]])


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("scorer", ["h2o", "snapkv(window=16)", "knorm"])
def test_in_caches(monkeypatch, scorer, fmt):
    cache = check_in_caches(monkeypatch, D2O, f"{scorer} | d2o | {fmt}", oracle())
    stats = cache.stats()
    assert 0 < stats.merged < stats.evicted


@pytest.mark.parametrize("bad", [0, -0.1, 1.1, True, "x"])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=r"d2o\(beta=.*: beta must be above 0 and at most 1"):
        D2O(beta=bad)

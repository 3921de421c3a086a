"""CaM from the paper, in loops: who is spread is drawn by a hash, in proportion to attention."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.policies.merge.cam import Cam
from tests.models import build, tokens
from tests.policies.groups import (
    Cell,
    cells,
    check_against,
    check_in_caches,
    check_rows,
    random_group,
)
from tests.policies.test_random import finalizer

SEEDS = range(6)


def draw(seed, layer, head, position):
    word = finalizer(seed)
    for part in (0xCA3, layer, head, position):
        word = finalizer(word ^ (part + 0x9E3779B9))
    return (word >> 8) / 2**24


def chances(cell: Cell, spread):
    """Probability and carriers of each loser."""
    for j in cell.lost:
        carriers = [i for i in cell.scored if i > j][:spread]
        if set(carriers) & set(cell.open):
            mean = sum(cell.scores[i] for i in carriers) / len(carriers)
            most = cell.scores[j] / mean if mean else float(cell.scores[j] > 0)
            yield j, min(1.0, most), carriers


def oracle(spread=32, seed=0):
    def merged(cell: Cell, dtype):
        values = cell.values.to(dtype).clone()
        for j, chance, carriers in chances(cell, spread):
            position = int(cell.group.positions[cell.row, cell.head, j])
            if draw(seed, cell.group.layer, cell.head, position) < chance:
                for i in set(carriers) & set(cell.open):
                    values[i] += cell.values[j].to(dtype) / len(carriers)
        return cell.keys, values

    return merged


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("spread", [1, 3, 32])
def test_equals_the_loops(seed, spread):
    group = random_group(seed)
    merger = Cam(spread=spread, seed=seed)
    made = merger.merge(group)
    check_against(group, made, oracle(spread, seed))
    check_rows(merger, group)
    assert made.keys is None and made.folded.any()


def test_survivors_that_carry_nothing_stay_to_the_bit():
    group = random_group(3, S=40)
    made = Cam(spread=2).merge(group)
    carriers = torch.zeros_like(group.open)
    for cell in cells(group):
        for j, _, chosen in chances(cell, 2):
            if made.folded[cell.row, cell.head, j]:
                carriers[cell.row, cell.head, chosen] = True
    carriers &= group.open
    changed = (made.values != group.values).any(-1)
    assert torch.equal(changed, carriers) and changed.any() and (group.open & ~changed).any()


def test_folds_as_often_as_attention_says():
    """Binomial counts over 20,000 draws, within 5 sigma."""
    group = random_group(5, B=2, H=2, S=10_000)
    group.scores = group.scores.clamp_min(0) ** 2
    made = Cam().merge(group)
    for cell in cells(group):
        chance = torch.tensor([p for _, p, _ in chances(cell, 32)])
        count = int(made.folded[cell.row, cell.head].sum())
        sigma = float((chance * (1 - chance)).sum().sqrt())
        assert abs(count - float(chance.sum())) <= 5 * sigma
        if cell.open and cell.lost:
            assert 0.3 < float(chance.mean()) < 0.7  # neither always nor never


def test_attention_to_the_lost_is_kept_on_average():
    """The carriers answer for A_i V_i: over many seeds, the sum of A_j dV_j is A_i V_i."""
    group = random_group(9, B=1, H=2, S=60)
    group.lost[:] = False
    group.lost[0, 1, 7] = True
    group.kept[:] = group.open[:] = ~group.lost
    group.scored[:] = True
    group.scores = 0.5 + group.scores.abs()
    group.scores[0, 1, 7] = 0.4
    runs = 400
    total = torch.zeros(group.values.shape[-1], dtype=torch.float64)
    for seed in range(runs):
        change = Cam(seed=seed).merge(group).values - group.values
        total += (group.scores[0, 1, :, None] * change[0, 1]).double().sum(0) / runs
    want = 0.4 * group.values[0, 1, 7]
    chance = 0.4 / float(group.scores[0, 1, 8:40].mean())
    sigma = want.abs() / chance * (chance * (1 - chance) / runs) ** 0.5
    assert ((total - want).abs() <= 5 * sigma).all()


def test_zero_attention_is_never_spread():
    group = random_group(4)
    group.scores = group.scores.clamp_min(0) * group.kept
    made = Cam().merge(group)
    assert not made.folded.any()
    assert torch.equal(made.values, group.values)


def test_nothing_is_spread_where_no_survivor_is_scored():
    group = random_group(4)
    group.scored &= group.lost
    made = Cam().merge(group)
    assert not made.folded.any()
    assert torch.equal(made.values, group.values)


def test_the_observation_window_is_not_scored(monkeypatch):
    """All of snapkv's window stays with a score of 0, which must not pass for attention."""
    groups = []
    original = Cam.merge
    monkeypatch.setattr(Cam, "merge", lambda *a: groups.append(a[1]) or original(*a))
    model = build("llama")
    model(tokens(80), past_key_values=CompressedCache(model, "snapkv(window=16) | cam", "50tok"))
    for group in groups:
        there = group.kept | group.lost
        assert torch.equal((there & ~group.scored).sum(-1), torch.full((1, 2), 16))
        assert (group.kept[..., -16:] & ~group.scored[..., -16:]).all()
    assert groups


@pytest.mark.parametrize(
    "scorer", ["knorm", "random", "recent", "keydiff", "criticalkv(base='random')"]
)
def test_scores_that_are_no_attention_are_refused(scorer):
    with pytest.raises(ValueError, match=r"recipe '.* \| cam': cam takes scores for attention"):
        CompressedCache(build("llama"), f"{scorer} | cam", "50tok")


@pytest.mark.parametrize("scorer", ["tova", "expected_attention", "criticalkv"])
def test_scores_that_are_attention_are_served(scorer):
    cache = CompressedCache(build("llama"), f"{scorer} | cam", "50tok")
    assert cache.recipe.scorer.scores_attention


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("scorer", ["h2o", "snapkv(window=16)"])
def test_in_caches(monkeypatch, scorer, fmt):
    recipe = f"{scorer} | cam(spread=8) | {fmt}"
    cache = check_in_caches(monkeypatch, Cam, recipe, oracle(8))
    stats = cache.stats()
    assert 0 < stats.merged < stats.evicted


@pytest.mark.parametrize("bad", [{"spread": 0}, {"spread": 1.5}, {"seed": 0.5}])
def test_bad_parameters_are_restated(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"cam\({name}=.*: {name} must be an int"):
        Cam(**bad)

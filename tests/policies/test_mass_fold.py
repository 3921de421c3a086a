"""MassFold in loops, and its promise: what is folded into its like attends as if it were still there."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.policies.merge.mass_fold import MassFold
from tests.models import build
from tests.policies.groups import (
    EPS,
    Cell,
    cells,
    check_against,
    check_in_caches,
    check_rows,
    random_group,
)

SEEDS = range(6)


def folds(cell: Cell, weight, least):
    """Survivor -> `(loser, w m)` of all that it takes in."""
    found: dict[int, list[tuple[int, float]]] = {}
    mass = cell.state["mass"].double().exp()
    targets = cell.kept if weight == "count" else cell.scored
    for j in cell.lost if targets else []:
        i, cosine = cell.most_like(j, targets)
        if cosine >= least and i in cell.open:
            w = 1.0 if weight == "count" else min(1.0, cell.scores[j] / cell.scores[i])
            found.setdefault(i, []).append((j, w * float(mass[j])))
    return found


def oracle(weight="count", least=-1.0):
    def merged(cell: Cell, dtype):
        values, mass = cell.values.to(dtype).clone(), cell.state["mass"].to(dtype).exp()
        for i, members in folds(cell, weight, least).items():
            total = mass[i] + sum(m for _, m in members)
            values[i] = mass[i] / total * cell.values[i].to(dtype)
            for j, m in members:
                values[i] += m / total * cell.values[j].to(dtype)
        return cell.keys, values

    return merged


def group_of(seed, **extra):
    group = random_group(seed, state=("mass",), **extra)
    group.state["mass"] = torch.log1p(group.state["mass"])
    return group


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("weight", "least"), [("count", -1.0), ("count", 0.4), ("score", 0.2)])
def test_equals_the_loops(seed, weight, least):
    group = group_of(seed)
    merger = MassFold(weight=weight, min_similarity=least)
    made = merger.merge(group)
    check_against(group, made, oracle(weight, least))
    check_rows(merger, group)
    for cell in cells(group):
        at = cell.row, cell.head
        exact = cell.state["mass"].double().exp()
        chosen = folds(cell, weight, least)
        for i, members in chosen.items():
            exact[i] += sum(m for _, m in members)
        got = made.state["mass"][at].double().exp()[cell.there]
        assert (got / exact[cell.there] - 1).abs().max() <= 16 * EPS
        folded = {j for members in chosen.values() for j, _ in members}
        assert set(made.folded[at].nonzero().flatten().tolist()) == folded


@pytest.mark.parametrize("seed", SEEDS)
def test_identical_members_attend_as_the_full_cache(seed):
    """Five kinds of entry, many of each: what stays of a kind attends as all of them did."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 5, (24,), generator=generator)
    kinds[:5] = torch.arange(5)
    kinds = kinds.expand(3, 2, 24)
    group = random_group(seed, state=("mass",))
    pick = kinds[..., None]
    group.keys = group.keys[:, :, :5].gather(2, pick.expand_as(group.keys))
    group.values = group.values[:, :, :5].gather(2, pick.expand_as(group.values))
    group.state["mass"].zero_()
    group.lost = torch.rand(3, 2, 24, generator=generator) < 0.7
    group.lost[..., :5] = False
    group.kept = group.open = ~group.lost
    group.keys, group.values = group.keys.clamp(-3, 3), group.values.clamp(-3, 3)
    made = MassFold(weight="count").merge(group)
    query = torch.randn(3, 2, 7, 8, generator=generator)

    def attention(dtype, values, mass, there):
        logits = (
            query.to(dtype) @ group.keys.to(dtype).mT * group.scale + mass.to(dtype)[:, :, None]
        )
        return logits.masked_fill(~there[:, :, None], -torch.inf).softmax(-1) @ values.to(dtype)

    everything, none = torch.ones_like(group.lost), torch.zeros(3, 2, 24)
    exact = attention(torch.float64, group.values, none, everything)
    naive = (attention(torch.float32, group.values, none, everything) - exact).abs().max()
    folded = attention(torch.float32, made.values, made.state["mass"], group.kept)
    assert (folded - exact).abs().max() <= 4 * naive + 8 * EPS
    dropped = attention(torch.float64, group.values, none, group.kept)
    assert (dropped - exact).abs().max() > 1e3 * naive


def test_ratios_of_scores_that_are_no_attention_are_refused():
    model = build("llama")
    with pytest.raises(
        ValueError, match=r"mass_fold takes scores for.*or mass_fold\(weight='count'\)"
    ):
        CompressedCache(model, "knorm | mass_fold", "50tok")
    CompressedCache(model, "knorm | mass_fold(weight='count')", "50tok")


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("scorer", ["h2o", "snapkv(window=16)", "knorm"])
def test_in_caches(monkeypatch, scorer, fmt):
    recipe = f"{scorer} | mass_fold(weight='count') | {fmt}"
    cache = check_in_caches(monkeypatch, MassFold, recipe, oracle())
    stats = cache.stats()
    assert 0 < stats.merged <= stats.evicted


@pytest.mark.parametrize("scorer", ["h2o", "snapkv(window=16)"])
def test_ratios_of_scores_in_caches(monkeypatch, scorer):
    recipe = f"{scorer} | mass_fold"
    stats = check_in_caches(monkeypatch, MassFold, recipe, oracle("score")).stats()
    assert 0 < stats.merged <= stats.evicted


def test_unscored_survivors_take_nothing_in():
    group = group_of(1)
    group.scored &= group.lost
    made = MassFold(weight="score").merge(group)
    assert not made.folded.any() and torch.equal(made.values, group.values)


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"weight": "mean"}, "weight is 'count' or 'score'"),
        ({"min_similarity": 2}, "min_similarity is a cosine"),
        ({"min_similarity": True}, "min_similarity is a cosine"),
    ],
)
def test_bad_parameters_are_restated(bad, rule):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"mass_fold\({name}=.*: {rule}"):
        MassFold(**bad)

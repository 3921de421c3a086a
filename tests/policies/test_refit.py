"""Refit against an independent least-squares solver, and its promises on the remembered queries."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom.policies.merge import _least_squares
from kvloom.policies.merge.refit import Refit
from tests.policies.groups import (
    Cell,
    cells,
    check_against,
    check_in_caches,
    check_rows,
    random_group,
)

SEEDS = range(6)


def equations(cell: Cell, dtype):
    """Per query of every head of the group: its weights before and after, `[T, S]` each."""
    group, keys = cell.group, cell.keys.to(dtype)
    queries = group.memory["queries"][cell.row, cell.head].to(dtype)  # [G, n, D]
    held, n = int(group.memory["held"][cell.row]), queries.shape[1]
    lost = set(cell.lost)
    before, after = [], []
    for newest in range(1, held + 1):
        visible = cell.there[: max(0, len(cell.there) - (newest - 1))]
        for query in queries[:, n - newest]:
            logits = keys @ query * group.scale
            if group.softcap is not None:
                logits = group.softcap * torch.tanh(logits / group.softcap)
            for rows, who in ((before, visible), (after, [s for s in visible if s not in lost])):
                weights = torch.zeros(len(keys), dtype=dtype)
                weights[who] = logits[who].softmax(0)
                rows.append(weights)
    return torch.stack(before), torch.stack(after)


def oracle(ridge):
    """`min ||[x; sqrt(ridge)] d - [left; 0]||` by orthogonal factors, over the open entries alone."""

    def merged(cell: Cell, dtype):
        values = cell.values.to(dtype).clone()
        if cell.open and cell.lost:
            before, after = equations(cell, dtype)
            there = torch.zeros(len(values), dtype=dtype)
            there[cell.there] = 1
            left = (before - after) @ (values * there[:, None])
            stacked = torch.cat(
                [after[:, cell.open], math.sqrt(ridge) * torch.eye(len(cell.open), dtype=dtype)]
            )
            zero = torch.zeros(len(cell.open), values.shape[1], dtype=dtype)
            wanted = torch.cat([left, zero])
            values[cell.open] += torch.linalg.lstsq(stacked, wanted, driver="gels").solution
        return cell.keys, values

    return merged


def squared_errors(group, values):
    """Over all cells: of dropping, and with these values."""
    dropped, refitted = [], []
    for cell in cells(group):
        if not (cell.open and cell.lost):
            continue
        before, after = equations(cell, torch.float64)
        old, new = (x[cell.row, cell.head].double() for x in (group.values, values))
        want = before @ old
        dropped.append(float((want - after @ old).square().sum()))
        refitted.append(float((want - after @ new).square().sum()))
    return dropped, refitted


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("queries", [4, 40])  # fewer than entries, and more
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_another_solver(seed, queries, softcap):
    group = random_group(seed, queries=queries, softcap=softcap)
    merger = Refit(queries=queries, ridge=0.02)
    made = merger.merge(group)
    check_against(group, made, oracle(0.02))
    check_rows(merger, group)


def test_small_blocks_change_nothing(monkeypatch):
    group = random_group(0, queries=4)
    whole = Refit(queries=4).merge(group).values
    monkeypatch.setattr(_least_squares, "_BLOCK_ELEMENTS", 1)
    assert torch.allclose(Refit(queries=4).merge(group).values, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("queries", [3, 30])
@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_never_worse_than_dropping(seed, queries, ridge):
    group = random_group(seed, queries=queries)
    made = Refit(queries=queries, ridge=ridge).merge(group)
    dropped, refitted = squared_errors(group, made.values)
    assert dropped
    assert all(new < old for old, new in zip(dropped, refitted, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_where_it_can_be(seed):
    """One query of each of two heads, and many open entries: nothing is lost to those two."""
    group = random_group(seed, queries=1)
    group.open = group.kept.clone()
    made = Refit(queries=1, ridge=1e-9).merge(group)
    dropped, refitted = squared_errors(group, made.values)
    assert all(new <= 1e-10 * old for old, new in zip(dropped, refitted, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dear_ridge_drops(seed):
    group = random_group(seed, queries=4)
    made = Refit(queries=4, ridge=1e9).merge(group)
    valid = group.kept | group.lost
    assert (made.values - group.values)[valid].abs().max() < 1e-6


def test_heads_without_losses_stay_to_the_bit():
    group = random_group(0, queries=4)
    made = Refit(queries=4).merge(group)
    assert torch.equal(made.values[0, 0], group.values[0, 0])
    assert torch.equal(made.values[0, 1], group.values[0, 1])  # nothing is open
    assert made.folded[0].sum() == 0
    assert torch.equal(made.folded[1:], group.lost[1:])


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("scorer", ["h2o", "snapkv(window=16)", "knorm"])
def test_in_caches(monkeypatch, scorer, fmt):
    recipe = f"{scorer} | refit(queries=8, ridge=0.01) | {fmt}"
    cache = check_in_caches(monkeypatch, Refit, recipe, oracle(0.01))
    stats = cache.stats()
    assert 0 < stats.merged <= stats.evicted


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"queries": 0}, "queries must be an int above 0"),
        ({"queries": 2.0}, "queries must be an int above 0"),
        ({"ridge": 0}, "ridge must be a finite number above 0"),
        ({"ridge": math.inf}, "ridge must be a finite number above 0"),
        ({"ridge": "x"}, "ridge must be a finite number above 0"),
    ],
)
def test_bad_parameters_are_restated(bad, rule):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"refit\({name}=.*: {rule}"):
        Refit(**bad)

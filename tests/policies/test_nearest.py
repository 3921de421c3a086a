"""Means into the nearest survivor: each token counts the same, however many folds ago it came."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from kvloom.policies.merge._counts import UNIT
from kvloom.policies.merge._nearest import nearest_open
from kvloom.policies.merge.nearest import Nearest
from kvloom.positions.rope import RopeSpec
from tests.policies.groups import (
    Cell,
    cells,
    check_against,
    check_in_caches,
    check_rows,
    random_group,
)

SEEDS = range(6)


def oracle(average_keys):
    def merged(cell: Cell, dtype):
        keys, values = cell.keys.to(dtype).clone(), cell.values.to(dtype).clone()
        members = {i: [i] for i in cell.open}
        for j in cell.matched:
            members[cell.nearest(j)[0]].append(j)
        for i, group in members.items():
            if len(group) == 1:
                continue
            count = [1 + float(cell.state["taken"][j]) for j in group]
            for x, source in ((values, cell.values), (keys, cell.keys)):
                if x is values or average_keys:
                    x[i] = sum(n * source[j].to(dtype) for n, j in zip(count, group, strict=True))
                    x[i] /= sum(count)
        return keys, values

    return merged


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keys", [False, True])
def test_equals_the_loops(seed, keys):
    group = random_group(seed, state=("taken",))
    made = Nearest(keys=keys).merge(group)
    assert (made.keys is not None) == keys
    check_against(group, made, oracle(keys))
    check_rows(Nearest(keys=keys), group)


def test_everything_finds_a_place_where_all_is_open():
    group = random_group(1, state=("taken",))
    group.open = group.kept
    assert torch.equal(Nearest().merge(group).folded, group.lost) and group.lost[0, 1].any()


def test_what_resembles_a_sealed_entry_most_is_dropped():
    group = random_group(1, state=("taken",))
    made = Nearest().merge(group)
    for cell in cells(group):
        folded = made.folded[cell.row, cell.head].nonzero().flatten().tolist()
        assert folded == cell.matched
    assert 0 < int(made.folded.sum()) < int(group.lost[group.open.any(-1)].sum())
    assert not made.folded[0, 1].any() and group.lost[0, 1].any()


def test_counts_are_the_tokens():
    group = random_group(2, state=("taken",))
    made = Nearest().merge(group)
    for cell in cells(group):
        if cell.open:
            before = sum(1 + float(cell.state["taken"][j]) for j in [*cell.open, *cell.matched])
            after = 1 + made.state["taken"][cell.row, cell.head][cell.open]
            assert float(after.sum()) == before


def test_a_mean_of_folds_is_the_mean_of_all():
    """Three tokens, one fold after the other, into the same survivor."""
    value, state = torch.tensor([2.0, 4.0, 9.0, 1.0]), torch.zeros(1, 1, 4)
    values = value.view(1, 1, 4, 1)
    for j in range(3):
        lost = torch.zeros(1, 1, 4, dtype=torch.bool)
        lost[..., j] = True
        kept = torch.tensor([[[False, False, False, True]]])
        group = random_group(0, B=1, H=1, S=4, values=values, lost=lost, kept=kept, open=kept)
        group.state = {"taken": state}
        made = Nearest().merge(group)
        values, state = made.values, made.state["taken"]
    assert float(values[0, 0, 3, 0]) == pytest.approx(4.0)
    assert float(state[0, 0, 3]) == 3


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("scorer", ["h2o", "snapkv(window=16)", "knorm"])
@pytest.mark.parametrize("keys", [False, True])
def test_in_caches(monkeypatch, scorer, fmt, keys):
    recipe = f"{scorer} | nearest(keys={keys}) | {fmt}"
    cache = check_in_caches(monkeypatch, Nearest, recipe, oracle(keys))
    stats = cache.stats()
    assert 0 < stats.merged <= stats.evicted
    assert fmt == "int4" or stats.merged == stats.evicted


@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=r"nearest\(keys=.*: keys is True or False"):
        Nearest(keys=bad)


def test_a_run_of_one_token_goes_to_the_older_side_whatever_rounding_says():
    """A key is exactly as like itself one place before as one after, but not to the last bit of fp32."""
    frequency = 10000.0 ** -(torch.arange(8) / 8)
    token = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    at = torch.arange(20, 23).expand(256, 3)
    keys = RopeSpec(frequency, 16).rotate(token[:, None].expand(-1, 3, -1), at)
    unit = normalize(keys, dim=-1)
    before, after = ((unit[:, 1] * unit[:, i]).sum(-1) for i in (0, 2))
    assert (after > before).any() and (after < before).any()

    radius = token.double().unflatten(-1, (2, 8)).square().sum(1)
    exact = UNIT * (radius * frequency.double().cos()).sum(-1) / radius.sum(-1)
    clear = (exact - exact.round()).abs() < 0.4  # not where noise rounds to another multiple
    lost = torch.tensor([False, True, False]).expand(1, 256, 3)
    _, index = nearest_open(keys[None], lost, ~lost, ~lost)
    assert clear.sum() > 128 and (index[0, clear, 1] == 0).all()

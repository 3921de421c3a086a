"""Budgets in three spellings, and what they buy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import Budget, Recipe
from kvloom.core import fit
from kvloom.core.budget import CellCost
from kvloom.core.plan import LayerPlan
from kvloom.formats.dense import Dense

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("512MiB", "bytes", 512 * 2**20),
        ("1.5GiB", "bytes", 3 * 2**29),
        ("2KiB", "bytes", 2048),
        ("3MB", "bytes", 3_000_000),
        ("1KB", "bytes", 1000),
        ("1GB", "bytes", 10**9),
        ("100B", "bytes", 100),
        (" 64 MiB ", "bytes", 2**26),
        (12345, "bytes", 12345),
        ("1024tok", "tokens", 1024),
        ("25%", "share", 0.25),
        ("12.5%", "share", 0.125),
        (".5%", "share", 0.005),
        ("100%", "share", 1.0),
    ],
)
def test_spellings(text, kind, amount):
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert Budget.parse(budget) is budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "shown"),
    [("300KiB", "300KiB"), ("1536MiB", "1536MiB"), ("1.5GiB", "1536MiB"), ("3MB", "3MB"),
     ("1024B", "1KiB"), ("100B", "100B"), (2**30, "1GiB"), ("12.50%", "12.5%"), (" 9 tok", "9tok")],
)  # fmt: skip
def test_a_budget_is_shown_in_the_largest_unit_that_fits(text, shown):
    assert str(Budget.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    ["", "512", "MiB", "-5MiB", "5 parsecs", "1e3tok", "0tok", "0%", "101%", "1.5tok", "25 %%",
     "5.MiB", "512mib", "nan%", "inf%", 0, -3, True, 2.5, None],
)  # fmt: skip
def test_bad_text_is_restated(text):
    with pytest.raises(ValueError, match="budget ") as error:
        Budget.parse(text)
    assert repr(text) in str(error.value)


costs = st.builds(
    CellCost,
    sinks=st.integers(0, 8),
    centroids=st.integers(0, 2),
    residual=st.sampled_from([0, 32, 128]),
    exact_slot=st.integers(1, 600),
    centroid_slot=st.integers(0, 600),
    page=st.integers(64, 20_000),
    page_meta=st.integers(0, 1000),
    overhead=st.integers(0, 300),
    dense_slot=st.just(512),
)


@SETTINGS
@given(costs, st.integers(1, 5))
def test_nbytes_grows_with_every_cell(cost, heads):
    before = 0
    for n in range(0, 400, 7):
        now = cost.nbytes(torch.full((1, heads), n))
        assert now >= before
        before = now
        one_more = torch.full((1, heads), n)
        one_more[0, -1] += 65
        assert cost.nbytes(one_more) >= now


@SETTINGS
@given(costs, st.integers(0, 3 * 10**6))
def test_entries_are_the_most_within_budget(cost, budget):
    n = cost.entries(budget)
    if n == 0:
        assert cost.nbytes(torch.tensor([cost.sinks + 1])) > budget
    else:
        assert n > cost.sinks
        assert cost.nbytes(torch.tensor([n])) <= budget
        assert cost.nbytes(torch.tensor([n + 1])) > budget


@SETTINGS
@given(costs, st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_solved_cells_fit_together(cost, cells):
    peaks = cost.solve(torch.tensor(cells, dtype=torch.float64))
    assert peaks.shape == (len(cells),)
    # nothing can be done below one entry per cell
    assert cost.nbytes(peaks) <= sum(cells) or int(peaks.max()) <= cost.sinks + 1
    order = sorted(range(len(cells)), key=cells.__getitem__)
    assert [int(peaks[i]) for i in order] == sorted(peaks.tolist())  # more bytes, not fewer entries


def plan(recipe, budget, layers=3, heads=2, fmt=None, layer=0):
    parsed = Recipe.parse(recipe)
    budget = None if budget is None else Budget.parse(budget)
    fmt = parsed.format or Dense()
    return LayerPlan(parsed, budget, fmt, layer, layers, heads, 16, 16, torch.float32)


@pytest.mark.parametrize("recipe", ["h2o", "h2o | int4", "streaming_llm(sinks=4) | int4_channel",
                                    "h2o | mean_centroid | lazy(every=32, slack=8) | int4"])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3])
def test_a_budget_in_bytes_bounds_the_ceiling(recipe, rows):
    for extra in (0, 1, 1000, 10**5, 10**7):
        floor = plan(recipe, None).floor()
        amount = rows * floor + extra
        ceilings = 0
        for layer in range(3):
            this = plan(recipe, amount, layer=layer)
            ceilings += this.ceiling(this.capacity(torch.full((rows,), 10**6)))
        assert ceilings <= amount


def test_the_floor_is_the_least_budget_in_bytes():
    least = plan("h2o | int4", None).floor()
    fit.check(plan("h2o | int4", least))
    with pytest.raises(ValueError, match=rf"'{least - 1}B' is below the floor.*{least} bytes"):
        fit.check(plan("h2o | int4", least - 1))


def test_tokens_below_the_sinks_are_refused():
    fit.check(plan("streaming_llm(sinks=4)", "5tok"))
    with pytest.raises(ValueError, match=r"'4tok' is below the floor.*4 sinks and 1 entry"):
        fit.check(plan("streaming_llm(sinks=4)", "4tok"))


@pytest.mark.parametrize(
    ("recipe", "budget", "rule"),
    [
        ("int4", "25%", "nothing in the recipe evicts"),
        ("none", "10tok", "nothing in the recipe evicts"),
        ("h2o", None, "none was given"),
        ("streaming_llm(recent=60)", "10tok", "states its own size.*64 entries"),
        ("h2o | lazy(every=64, max_drop=8, rule='paper', unbounded=True)", "90tok", "no bound"),
        ("h2o | lazy(every=0)", "90tok", "nothing in the recipe evicts"),
    ],
)
def test_recipes_and_budgets_that_do_not_fit(recipe, budget, rule):
    with pytest.raises(ValueError, match=rule) as error:
        fit.check(plan(recipe, budget))
    assert str(Recipe.parse(recipe)) in str(error.value)


def test_a_share_grows_with_the_tokens_seen_row_by_row():
    this = plan("h2o | int4", "25%")
    seen = torch.tensor([100, 4000, 100_000])
    together = this.capacity(seen)
    alone = torch.cat([this.capacity(seen[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert (together[1:] >= together[:-1]).all()
    dense = this.cost.dense_slot * this.heads * 100_000
    assert this.ceiling(together[2:]) <= 0.25 * dense
    # int4 holds an entry in about 4.75 bits of 16, so a quarter of the bytes is more than that
    assert together[2, 0] > 0.5 * 100_000


def test_ragged_shares_split_entries_in_proportion():
    recipe = "h2o | weighted(heads=(1.0, 3.0), layers=(1.0, 1.0, 2.0))"
    got = torch.cat(
        [plan(recipe, "120tok", layer=i).capacity(torch.tensor([500])) for i in range(3)]
    )
    weights = torch.tensor([[1.0, 3], [1, 3], [2, 6]])
    assert torch.equal(got, (120 * weights / weights.mean()).floor().long())
    assert abs(int(got.sum()) - 6 * 120) < 6

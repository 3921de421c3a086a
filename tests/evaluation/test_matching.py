"""Budgets adjusted until the bytes that they say are held, by made-up caches and by real ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom.core.budget import Budget
from kvloom.evaluation import equal, matching, task_bench
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.experiment_file import read
from kvloom.evaluation.ledger import read_row
from kvloom.evaluation.matching import Probe, match
from kvloom.evaluation.results import Matched
from kvloom.evaluation.subjects import Cell, parse
from tests.evaluation.conftest import ROW, changed
from tests.evaluation.tiny import ByteTokenizer, bench
from tests.models import build

QUARTER = Budget.parse("25%")


def cache(held: Callable[[float], float], floor: float = 0.0, evicted: int = 9):
    """A probe of a cache that holds `held(share)` of the model's bytes, where a quarter is wanted."""
    return lambda budget: Probe(held(budget.amount) / 0.25, floor / 0.25, evicted)


@pytest.mark.parametrize(
    "held",
    [
        lambda share: share,
        lambda share: 0.6 * share,
        lambda share: share - 0.11,
        lambda share: 0.9 * share**2,
        lambda share: math.floor(share / 0.004) * 0.004,  # pages of 1.6 % of the target
        lambda share: 0.2 if share < 0.3 else share - 0.08,  # a step before anything changes
    ],
)
def test_what_is_held_comes_to_what_the_budget_says(held: Callable[[float], float]) -> None:
    given, found = match(QUARTER, cache(held))
    assert found.reached and found.why is None
    assert abs(held(given.amount) / 0.25 - 1) <= matching.WITHIN
    assert found.given == str(given) and len(found.tried) == len(found.held) <= matching.TRIES


def test_what_holds_it_already_is_left_alone() -> None:
    given, found = match(QUARTER, cache(lambda share: 0.995 * share))
    assert given == QUARTER and found.tried == ["25%"]


def test_coarse_pages_are_brought_as_near_as_they_come() -> None:
    given, found = match(QUARTER, cache(lambda share: math.floor(share / 0.03) * 0.03))
    assert not found.reached and found.why == matching.PAGES
    assert math.floor(given.amount / 0.03) * 0.03 in (pytest.approx(0.24), pytest.approx(0.27))


@pytest.mark.parametrize(
    ("held", "floor", "evicted", "why"),
    [
        (lambda share: max(share, 0.4), 0.4, 9, matching.FLOOR),
        (lambda share: 0.1, 0.0, 0, matching.NOTHING),
    ],
)
def test_what_no_budget_changes_is_tried_once(
    held: Callable[[float], float], floor: float, evicted: int, why: str
) -> None:
    given, found = match(QUARTER, cache(held, floor, evicted))
    assert given == QUARTER and found.tried == ["25%"]
    assert (found.reached, found.why) == (False, why)


def test_entries_are_no_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="budget '64tok' counts entries"):
        match(Budget.parse("64tok"), cache(lambda share: share))
    path = tmp_path / "x.toml"
    path.write_text(
        'title = "x"\n[defaults]\nequal_bytes = true\n[[grid]]\nname = "a"\nrecipes = ["h2o"]\nbudgets = ["64tok"]\n'
    )
    with pytest.raises(ValueError, match="budget '64tok' counts entries"):
        read(path)


def test_rows_of_documents_hold_what_their_budget_says() -> None:
    """The row keeps the budget as asked, and says which one the cache had."""
    made = bench(tokens=2060, prefill=2050)
    rows = [
        made.measure(Cell(parse(r), Budget.parse("60%"), equal_bytes=True), Progress())
        for r in ("streaming_llm", "knorm")
    ]
    for row in rows:
        matched = row.subject.matched
        assert matched is not None and matched.reached and row.subject.budget == "60%"
        assert equal.budget_use(row) == pytest.approx(1, abs=matching.WITHIN)
        assert matched.held[matched.tried.index(matched.given)] == pytest.approx(
            equal.budget_use(row), abs=1e-3
        )
        assert read_row(row.to_json()) == row
    equal.require_equal(rows)
    assert equal.remarks(rows) == ["60%: equal bytes, within 2%, budgets adjusted until they were."]


def test_rows_of_tasks_hold_what_their_budget_says() -> None:
    model = build("llama")
    made = task_bench.prepare_task(
        model, ByteTokenizer(), "tiny", "key_value(length=2048, examples=1)"
    )
    row = made.measure(Cell(parse("knorm"), Budget.parse("60%"), equal_bytes=True), Progress())
    matched = row.subject.matched
    assert matched is not None and matched.reached and read_row(row.to_json()) == row
    assert equal.budget_use(row) == pytest.approx(1, abs=matching.WITHIN)


def test_a_matched_cell_has_a_key_of_its_own() -> None:
    made, cell = bench(), Cell(parse("knorm"), QUARTER)
    own = dataclasses.replace(cell, equal_bytes=True)
    assert made.key(cell) != made.key(own)
    free = Cell(parse("none"))
    assert made.key(free) == made.key(dataclasses.replace(free, equal_bytes=True))


def test_rows_from_before_are_read_as_not_matched() -> None:
    line = ROW.to_json()
    assert '"matched":null' in line
    assert read_row(line.replace(',"matched":null', "")) == ROW
    with pytest.raises(ValueError, match="evicts"):
        read_row(line.replace(',"evicts":false', ""))


def test_what_could_not_be_matched_is_said() -> None:
    no = Matched("30%", ["25%", "30%"], [0.8, 0.9], False, matching.PAGES)
    subject = {"recipe": "h2o", "budget": "25%", "evicts": True, "matched": no}
    rows = [
        changed(ROW, key=str(i), subject=subject | {"recipe": f"r{i}"}, bytes={"mean": 1000.0 * use, "allowed": 1000.0})
        for i, use in enumerate((1.0, 0.9))
    ]  # fmt: skip
    (said,) = equal.remarks(rows)
    assert (
        said
        == "25%: NOT equal bytes; against the largest: r1 -10% (budgets were adjusted as far as whole pages allow)."
    )

"""README's table is what its script makes of the committed rows, and the rows are the demo's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest

from kvloom.cli.compare import demo_options
from kvloom.evaluation import equal
from kvloom.evaluation.subjects import cells_of
from tests.evaluation.conftest import changed
from tests.scripts import load

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(DOCS / "make_demo.py")


def test_the_table_is_made_from_the_rows(script: ModuleType) -> None:
    page = script.README.read_text(encoding="utf-8")
    assert page.count(script.START) == page.count(script.END) == 1
    assert page == script.filled(page, script.rows()), "run `make docs` and commit README.md"
    assert script.FIGURE.exists()


def test_the_rows_are_those_of_the_demo(script: ModuleType) -> None:
    rows, options = script.rows(), demo_options(Path())
    cells = [(r.subject.recipe, r.subject.budget) for r in rows]
    wanted = [c.facts for c in cells_of(options.recipes, options.budgets)]
    assert cells == [(s.recipe, s.budget) for s in wanted]
    assert {dataclasses.replace(r.protocol, needle_sha256="") for r in rows} == {options.protocol}
    assert len({r.environment for r in rows}) == 1 and "dirty" not in str(rows[0].environment.git)


def test_every_budget_of_the_demo_binds(script: ModuleType) -> None:
    assert not any(equal.idle(row) for row in script.rows())


def test_another_row_makes_another_table(script: ModuleType) -> None:
    page, rows = script.README.read_text(encoding="utf-8"), script.rows()
    other = [changed(rows[0], quality={"top1": 0.1234}), *rows[1:]]
    assert "| 12.3 % |" in script.filled(page, other) != page

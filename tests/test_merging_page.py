"""`docs/results/merging.md` says what its rows say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(DOCS / "make_merging.py")


def test_the_page_is_made_from_its_rows(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.filled(page, script.tables()) == page, "run `make docs` and commit merging.md"
    assert script.lines("ablation") and script.sweep_rows()


def test_an_interval_holds_the_mean_and_shrinks_to_a_constant(script: ModuleType) -> None:
    mean, low, high = script.interval([0.1, 0.4, -0.2, 0.3])
    assert low <= mean <= high and low < 0 < high
    assert script.interval([0.5] * 6) == (0.5, 0.5, 0.5)


def test_a_needles_interval_is_wilsons(script: ModuleType) -> None:
    assert [round(x, 1) for x in script.wilson(7, 8)] == [52.9, 97.8]
    assert script.wilson(0, 16)[0] == 0 and script.wilson(16, 16)[1] == 100

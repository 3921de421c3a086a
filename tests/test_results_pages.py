"""`docs/results/NAME.md` say what the rows of their experiments say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from kvloom.evaluation import equal
from kvloom.evaluation.experiment import load as record
from tests.scripts import load

DOCS = Path(__file__).parents[1] / "docs"
FOLDERS = sorted(path.parent for path in (DOCS / "results").glob("*/experiment.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(DOCS / "make_results.py")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_pages_are_made_from_their_rows(script: ModuleType, folder: Path) -> None:
    page = folder.with_suffix(".md").read_text(encoding="utf-8")
    text, pictures = script.body(folder)
    assert script.filled(page, {script.MARK: text}) == page, "run `make docs`"
    for section, picture in pictures:
        assert (folder / f"{section.file(picture)}.png").exists()


def test_the_index_links_pages_that_are_there(script: ModuleType) -> None:
    index = (DOCS / "results" / "README.md").read_text(encoding="utf-8")
    assert script.experiments() == FOLDERS and FOLDERS
    for folder in FOLDERS:
        assert f"({folder.name}.md)" in index
    for name in [line.split("](")[1].split(")")[0] for line in index.splitlines() if "](" in line]:
        assert (DOCS / "results" / name).exists()


def test_what_is_compared_at_one_budget_holds_equal_bytes() -> None:
    """Within 2 %, or the page says so."""
    for folder in FOLDERS:
        page = folder.with_suffix(".md").read_text(encoding="utf-8")
        experiment = record(folder)
        for grid in {o.spec.grid for o in experiment.outcomes}:
            rows = [o.row for o in experiment.grid(grid) if o.row is not None]
            for budget, held in equal.groups(rows).items():
                tasks = {getattr(getattr(r, "task", None), "task", None) for r in held}
                if budget is None or len(tasks) > 1:
                    continue
                try:
                    equal.require_equal(held)
                except ValueError:
                    assert "NOT equal bytes" in page, (folder.name, grid, budget)

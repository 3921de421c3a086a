"""`docs/analyze.md` says what its rows say, and its figures are drawn from them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(DOCS / "make_analyze.py")


def test_the_page_is_made_from_its_rows(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.filled(page, script.tables()) == page, "run `make docs` and commit analyze.md"


def test_the_commands_of_the_page_are_those_that_were_run(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    for name in ("manifold", "attention"):
        recipe = script.CASES[name][-1]
        command = f"kvloom analyze {name}"
        shown = page[page.index(command) :].partition("```")[0]
        assert f'--recipe "{recipe}"' in shown and "--layer 3" in shown


@pytest.mark.full
def test_its_figures_are_drawn_from_its_rows(script: ModuleType, tmp_path: Path) -> None:
    script.draw(tmp_path)
    drawn = sorted(p.name for p in tmp_path.iterdir())
    assert drawn == ["analyze_attention.png", "analyze_manifold.png", "analyze_transitions.png"]
    page = script.PAGE.read_text(encoding="utf-8")
    assert all(f"(images/{name})" in page and (script.IMAGES / name).exists() for name in drawn)

"""The tables of docs/kernels.md are what their script makes of the committed rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(DOCS / "make_kernels.py")


def test_the_tables_are_made_from_the_rows(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count(script.START) == page.count(script.END) == 1
    made = script.filled(page, *map(script.rows, script.TABLES))
    assert page == made, "run `make docs` and commit docs/kernels.md"


def test_a_newer_row_replaces_the_older(script: ModuleType) -> None:
    steps, *others = map(script.rows, script.TABLES)
    page = script.PAGE.read_text(encoding="utf-8")
    newer = {**steps[-1], "ms": "12345.678"}
    made = script.filled(page, [*steps, newer], *others)
    assert made.count("12345.68") == 1
    assert made.count("\n") == page.count("\n")

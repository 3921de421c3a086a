"""The tables of formats are what their script makes of the committed rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvloom.core.recipe import Recipe
from kvloom.evaluation.results import Row
from tests.evaluation.conftest import changed

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_formats", DOCS / "make_formats.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(script: ModuleType) -> list[Row]:
    measured: list[Row] = script.rows("formats")
    return measured


def test_the_tables_are_made_from_the_rows(script: ModuleType) -> None:
    for path, markers in zip(script.PAGES, (2, 1), strict=True):
        page = path.read_text(encoding="utf-8")
        assert page.count("<!-- rows of ") == page.count("<!-- end of ") == markers
        assert page == script.fill(page), f"run `make docs` and commit {path.name}"
    assert script.FIGURE.exists()


def test_another_row_makes_another_table(script: ModuleType, found: list[Row]) -> None:
    other = [changed(found[0], quality={"top1": 0.1234}), *found[1:]]
    assert "| 12.3% |" in script.table(other) != script.table(found)


def test_rows_of_one_table_share_a_protocol_a_text_and_a_machine(found: list[Row]) -> None:
    assert len({dataclasses.replace(r.protocol, needle_sha256="") for r in found}) == 1
    assert len({r.text for r in found}) == len({r.model for r in found}) == 1
    machines = {(r.environment.cpu, r.environment.capability, r.environment.threads) for r in found}
    assert len(machines) == 1
    assert "dirty" not in " ".join(str(r.environment.git) for r in found)
    assert "/root" not in "".join(r.to_json() for r in found)


def test_bits_of_sealed_pages_are_those_of_the_layout(script: ModuleType, found: list[Row]) -> None:
    """Where every page has sets of its own, and but for 4 bytes for each id of a set."""
    checked = 0
    for row in found:
        fmt = Recipe.parse(re.sub(r", calibration='[^']*'", "", row.subject.recipe)).format
        if (
            fmt is None
            or row.subject.recipe.startswith("streaming")
            or "calib" in row.subject.recipe
        ):
            continue
        layout = fmt.layout(row.model.head_dim, row.model.head_dim, torch.float32)
        ids = 2 * 4 * 8 * len(layout.sets) / (64 * row.model.head_dim)
        for part, bits in zip(("key", "value"), script.page_bits(row), strict=True):
            assert layout.bits(part, row.model.head_dim) - 1e-6 <= bits
            assert bits <= layout.bits(part, row.model.head_dim) + ids + 1e-6
        checked += 1
    assert checked > 15


def test_bits_are_refused_where_exact_entries_cannot_be_counted(
    script: ModuleType, found: list[Row]
) -> None:
    with pytest.raises(ValueError, match="has evicted"):
        script.page_bits(changed(found[0], counts={"evicted": 3}))


def test_streaming_rows_hold_less_than_a_set_of_scales_for_each_page(
    script: ModuleType, found: list[Row]
) -> None:
    """Chunks share them: the worst case of a layout is not what was held."""
    mine = [r for r in found if r.subject.recipe == "streaming_kvquant"]
    assert len(mine) == 1 and 4 < script.page_bits(mine[0])[0] < 4.25

"""The tables of formats are what their script makes of the committed rows, both models alike."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvloom.core.recipe import Recipe
from tests.scripts import load

ROOT = Path(__file__).parents[1]
MEASURED = ("formats", "formats-loud-keys")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(ROOT / "docs" / "make_formats.py")


@pytest.fixture(scope="module", params=MEASURED)
def found(script: ModuleType, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    measured: list[dict[str, Any]] = script.rows(request.param)
    return measured


def test_the_tables_are_made_from_the_rows(script: ModuleType) -> None:
    for path, markers in zip(script.PAGES, (4, 1), strict=True):
        page = path.read_text(encoding="utf-8")
        assert page.count("<!-- rows of ") == page.count("<!-- end of ") == markers
        assert page == script.fill(page), f"run `make docs` and commit {path.name}"
        assert script.NOTHING not in page
    assert script.FIGURE.exists()


def test_another_row_makes_another_table(script: ModuleType, found: list[dict[str, Any]]) -> None:
    other = [{**row, "top1": [0.1234]} if row["recipe"] == "int8" else row for row in found]
    assert "| 12.3% |" in script.table(other) != script.table(found)
    louder = copy.deepcopy(found)
    next(row for row in louder if row["recipe"] == "int8")["nll"][0] += 0.5
    assert script.expected(louder) != script.expected(found)


def test_an_expectation_holds_by_two_standard_errors(script: ModuleType) -> None:
    assert [script._verdict(x, 1.0) for x in (-2.5, -1.5, 1.5, 2.5)] == [
        "yes",
        "open",
        "open",
        "no",
    ]


def test_rows_of_one_table_share_a_setting_a_text_a_machine_and_sources(
    found: list[dict[str, Any]],
) -> None:
    for part in ("setting", "text", "model", "environment"):
        assert len({json.dumps(row[part]) for row in found}) == 1, part
    assert not str(found[0]["environment"]["git"]).endswith("dirty")
    assert "/root" not in json.dumps(found)


def test_both_models_are_measured_with_the_same_recipes_on_the_same_text(
    script: ModuleType,
) -> None:
    plain, loud = (script.rows(folder) for folder in MEASURED)
    assert list(map(script.name, plain)) == list(map(script.name, loud)) and len(plain) > 30
    assert (plain[0]["setting"], plain[0]["text"]) == (loud[0]["setting"], loud[0]["text"])
    assert plain[0]["model"]["sha256"] != loud[0]["model"]["sha256"]
    for a, b in zip(plain[0]["dense_nll"], loud[0]["dense_nll"], strict=True):
        assert a == pytest.approx(b, rel=1e-4), "the copy is no longer the same function"


def test_bits_of_sealed_pages_are_those_of_the_layout(
    script: ModuleType, found: list[dict[str, Any]]
) -> None:
    """Where every page has sets of its own, and but for 4 bytes for each id of a set."""
    checked = 0
    for row in found:
        fmt = Recipe.parse(re.sub(r", calibration='[^']*'", "", row["recipe"])).format
        if fmt is None or row["recipe"].startswith("streaming") or "calib" in row["recipe"]:
            continue
        width = row["model"]["head_dim"]
        layout = fmt.layout(width, width, torch.float32)
        ids = 2 * 4 * 8 * len(layout.sets) / (64 * width)
        for part, bits in zip(("key", "value"), script.page_bits(row), strict=True):
            assert layout.bits(part, width) - 1e-6 <= bits <= layout.bits(part, width) + ids + 1e-6
        checked += 1
    assert checked > 15


def test_bits_are_refused_where_exact_entries_cannot_be_counted(
    script: ModuleType, found: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="has evicted"):
        script.page_bits({**found[0], "evicted": 3})


def test_streaming_rows_hold_less_than_a_set_of_scales_for_each_page(script: ModuleType) -> None:
    """Chunks share them: the worst case of a layout is not what was held."""
    mine = [row for row in script.rows("formats") if row["recipe"] == "streaming_kvquant"]
    assert len(mine) == 1 and 4 < script.page_bits(mine[0])[0] < 4.25


def test_a_scale_per_key_channel_takes_loud_channels_as_they_are(script: ModuleType) -> None:
    """The page says that such rows are the same for both models, in every setting."""
    plain, loud = (
        {(script.name(row), json.dumps(row["setting"])): row for row in script.lines(folder)}
        for folder in MEASURED
    )
    channels = ("kivi", "kvquant", "streaming", "int4(keys='channel'")
    same = [at for at in plain if at in loud and at[0].startswith(channels)]
    assert len(same) > 25 and len({setting for _, setting in same}) == 2
    for at in same:
        assert loud[at]["kl"] == pytest.approx(plain[at]["kl"], rel=1e-3), at
        assert loud[at]["right"] == plain[at]["right"], at
    plain, loud = ({script.name(r): r for r in script.rows(folder)} for folder in MEASURED)
    assert min(loud["int4"]["kl"]) > 5 * max(plain["int4"]["kl"])

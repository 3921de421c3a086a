"""Records of experiments: what is none is refused by name, however it is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvloom.evaluation.experiment import NAME, load
from tests.evaluation.report import made

Record = dict[str, Any]


def spoiled(folder: Path, change: Callable[[Record], Any]) -> Path:
    """A folder whose record is `change` of a good one."""
    made.write(made.experiment(made.main_grid()), folder)
    record = json.loads((folder / NAME).read_text(encoding="utf-8"))
    (folder / NAME).write_text(json.dumps(change(record)), encoding="utf-8")
    return folder


def without(*path: Any) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        held: Any = record
        for step in path[:-1]:
            held = held[step]
        del held[path[-1]]
        return record

    return change


def test_a_record_is_read_with_its_rows(tmp_path: Path) -> None:
    read = load(made.write(made.experiment(made.main_grid()), tmp_path))
    assert len(read.outcomes) == 30 and sum(o.row is not None for o in read.outcomes) == 29


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("outcomes"), "it has no 'outcomes'"),
        (without("title"), "title"),
        (without("outcomes", 0, "spec"), "it has no 'spec'"),
        (without("outcomes", 0, "spec", "recipe"), "recipe"),
        (lambda r: r | {"more": 1}, "more"),
        (lambda r: r | {"outcomes": 3}, "iterable"),
        (lambda r: r | {"outcomes": ["x"]}, "whole record"),
        (lambda r: r | {"claims": [None]}, "mapping"),
        (lambda r: r | {"claims": [r["claims"][0] | {"metric": "f1"}]}, "metric 'f1': one of"),
        (lambda r: r | {"version": 99}, "that this kvloom reads"),
        (lambda r: [r], "a JSON object"),
    ],
)
def test_a_broken_record_is_named(
    change: Callable[[Record], Any], words: str, tmp_path: Path
) -> None:
    folder = spoiled(tmp_path, change)
    with pytest.raises(ValueError, match=words) as error:
        load(folder)
    assert NAME in str(error.value)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="holds no experiment") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)

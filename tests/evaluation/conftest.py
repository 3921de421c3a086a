"""A row to put into files and tables, and a tiny model with a tokenizer of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvloom.evaluation.results import (
    Bytes,
    Counts,
    Environment,
    Model,
    Protocol,
    Quality,
    Row,
    Series,
    Subject,
    Text,
    Timing,
)

ROW = Row(
    key="k0", measured_at="2026-01-01T00:00:00+00:00", took=1.5,
    model=Model("m", "h", "llama", 10, 2, 1, 4, 4096, "float32"),
    subject=Subject("none", "none", None, False, False),
    text=Text("stdlib", "t", 100),
    protocol=Protocol(tokens=100, prefill=40),
    environment=Environment("0", None, "s", "3", "2", "5", "Linux", "cpu", "AVX2", 2, 1, "cpu", None),
    bytes=Bytes(
        1000, {"pages": 600, "tail": 400}, 900.0, 1000, 1100, 0.0, 800, 720.0, 1600, None, 90, 10, None,
        4.5, 4.5,
    ),
    quality=Quality(10.0, 11.0, 10.0, 10.0, 0.1, 0.5, 0.9, 99, 59, 1, 2),
    timing=Timing(0.1, 0.002, 0.003, 0.004, 0.12, 59, 491.0, 0.1, 0.001, 16, 1.0, 2.0, 0.5),
    counts=Counts(1, 2, 3, 4, 5),
    series=Series([41, 42], [41.0, 42.0], [900, 1000], [0.002, 0.002], [42], [0.001]),
)  # fmt: skip


@pytest.fixture
def row() -> Row:
    return ROW


def changed(row: Row, **parts: Any) -> Row:
    """`row` with fields of its parts replaced: `changed(row, bytes={"mean": 1.0}, key="x")`."""
    fields = {
        k: dataclasses.replace(getattr(row, k), **v) if isinstance(v, dict) else v
        for k, v in parts.items()
    }
    return dataclasses.replace(row, **fields)

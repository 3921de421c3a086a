"""The benchmarks for GPUs run as they would there, at tiny shapes and without times, in the interpreter."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.test_triton import _forced  # noqa: F401

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "recipes", "lines"),
    [
        ("gpu_attention", ["none", "int4"], 2),
        ("gpu_generate", ["DynamicCache", "none", "snapkv | int4 @ 25%"], 5),
    ],
)
def test_check_only(monkeypatch, capsys, name, recipes, lines):
    """Each compares its results with float64 or the reference, and stops where they differ."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    importlib.import_module(name).main(["--check-only", "--recipes", *recipes])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines and all("'error'" in line for line in printed)

"""The code of docs/custom-format.md, as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvloom.core import registry
from kvloom.core.format import PAGE
from kvloom.core.recipe import Recipe
from tests.formats.reading import Cell, place_of

GUIDE = Path(__file__).parents[2] / "docs" / "custom-format.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)


def load(name: str, code: str, folder: Path) -> ModuleType:
    """`code` as a file that is imported under `name`."""
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def shared_exponent(tmp_path_factory):
    yield load("shared_exponent", BLOCKS[0], tmp_path_factory.mktemp("guide"))
    del sys.modules["shared_exponent"]
    registry._discover().pop("shared_exponent")


def test_the_example_runs_and_its_figure_is_right(tmp_path, capsys):
    try:
        used = load("use", BLOCKS[1], tmp_path)
    finally:
        sys.modules.pop("use", None)
    stats = used.cache.stats()
    assert stats.sealed > 0 and stats.evicted > 0
    assert "shared_exponent" in capsys.readouterr().out
    stated = float(re.search(r"makes it ([\d.]+) bits", GUIDE.read_text())[1])
    layout = Recipe.parse("shared_exponent").format.layout(64, 64, torch.float32)
    assert layout.bits("key", 64) == stated


@pytest.mark.parametrize("bits", [8, 5])
def test_codes_are_those_of_the_equation(bits):
    x = torch.randn(1, PAGE, 16) * torch.logspace(-3, 4, PAGE)[:, None]
    x[0, 9] = 0
    fmt = Recipe.parse(f"shared_exponent(bits={bits})").format
    for got in Cell(fmt, place_of(16, 16)).read(x, x):
        for t in range(PAGE):
            peak, step = float(x[0, t].abs().max()), 2.0**-126
            while step * (2 ** (bits - 1) - 1) < peak * (1 - 1e-6):
                step *= 2
            assert float((got[0, t] - x[0, t]).abs().max()) <= step / 2


def test_other_blocks_are_python_and_links_lead_somewhere():
    for block in BLOCKS[2:]:
        compile(block, str(GUIDE), "exec")
    root = GUIDE.parents[1]
    for path in re.findall(r"`((?:formats|kernels|tests|src)/[\w/.]+)`", GUIDE.read_text()):
        assert (root / path).exists() or (root / "src" / "kvloom" / path).exists(), path


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match=r"shared_exponent\(bits=9\): bits is between 2 and 8"):
        Recipe.parse("shared_exponent(bits=9)")

"""`docs/methods.md` is what its script makes of the docstrings."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from kvloom.core import registry
from tests.scripts import load

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(DOCS / "make_methods.py")


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    committed = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert committed == script.page(), "run `make docs` and commit docs/methods.md"


def test_every_method_and_preset_is_on_the_page(script: ModuleType) -> None:
    page = script.page()
    own = [c for c in registry.policies().values() if c.__module__.startswith("kvloom.")]
    assert own and all(f"### {c.name}\n" in page for c in own)
    assert all(f"| `{name}` |" in page for name in registry.presets())


def test_every_parameter_must_be_explained(script: ModuleType) -> None:
    snapkv = registry.policies("scorer")["snapkv"]
    with pytest.raises(ValueError, match="must explain exactly window, kernel, pooling"):
        script._table(snapkv, "window: W. kernel: k.")

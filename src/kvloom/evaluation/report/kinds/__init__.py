"""Kinds of figures: a file here is a kind of its name, found by being here.

Each has `make(data) -> list[Block]`, which raises `Missing` if the rows that it needs are not there and
ValueError on options that make no sense, and `OPTIONS`, name -> what it is for. `TOGETHER = True`: rows of
several models stand in one figure; without it, there is one figure per model.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from kvloom.evaluation.experiment import Figure


@cache
def found() -> dict[str, ModuleType]:
    """All kinds by name; files whose name begins with `_` are shared pieces."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def check(figure: Figure) -> ModuleType:
    """The kind of a figure. Raises ValueError if there is none, or it has no such option."""
    known = found()
    if figure.kind not in known:
        raise ValueError(
            f"figure {figure.title!r}: kind {figure.kind!r} is none of {', '.join(known)}"
        )
    kind = known[figure.kind]
    for name in figure.options:
        if name not in kind.OPTIONS:
            listed = ", ".join(kind.OPTIONS) or "no options"
            raise ValueError(
                f"figure {figure.title!r}: {figure.kind} has no option {name!r} (it has: {listed})"
            )
    return kind

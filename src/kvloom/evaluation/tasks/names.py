"""Tasks by name: discovery of this package's files, and text to task."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from functools import cache
from inspect import isabstract
from typing import Any

from kvloom.core.literals import arguments, hint
from kvloom.evaluation.tasks.base import Task

_PACKAGE = "kvloom.evaluation.tasks"


@cache
def _discover() -> dict[str, type[Task]]:
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__, f"{_PACKAGE}."):
        importlib.import_module(module.name)
    found: dict[str, type[Task]] = {}
    for cls in _walk(Task):  # type: ignore[type-abstract]
        if isabstract(cls) or not cls.name or not cls.__module__.startswith(f"{_PACKAGE}."):
            continue
        if found.setdefault(cls.name, cls) is not cls:
            raise ValueError(f"two tasks are called {cls.name!r}: {found[cls.name]} and {cls}")
    return dict(sorted(found.items()))


def _walk(cls: type[Task]) -> list[type[Task]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _walk(sub))]


def known() -> dict[str, type[Task]]:
    """All tasks by name."""
    return dict(_discover())


def parse(text: str) -> Task:
    """A task from text such as `"needle(length=2048)"` or `"needle"`; values are literals.

    Raises ValueError that restates the text and names the rule it breaks.
    """
    name, given = _call(text)
    if name not in known():
        likely = hint(name, known()) or f"; known are {', '.join(known())}"
        raise ValueError(f"task {text!r}: unknown task {name!r}{likely}")
    cls = known()[name]
    parameters = [f.name for f in dataclasses.fields(cls)]
    for parameter in given:
        if parameter not in parameters:
            raise ValueError(
                f"task {text!r}: {name} has no parameter {parameter!r}"
                f"{hint(parameter, parameters)} (it has: {', '.join(parameters)})"
            )
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    missing = [parameter for parameter in needed if parameter not in given]
    if missing:
        raise ValueError(f"task {text!r}: {name} needs {' and '.join(missing)}")
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"task {text!r}: {error}") from None


def _call(text: str) -> tuple[str, dict[str, Any]]:
    rule = "write a name with parameters, as in needle(length=2048, depth=0.5)"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):  # ValueError: a NUL
        raise ValueError(f"task {text!r}: {rule}") from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"task {text!r}: {rule}")
    return node.func.id, arguments(node, f"task {text!r}", rule)

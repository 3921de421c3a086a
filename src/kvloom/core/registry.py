"""Which policies exist: discovery of kvloom's own files and of the entry point group.

A method is one file below `kvloom.policies` or `kvloom.formats`; nothing lists it. Another package
adds its own through the entry point group `kvloom.policies`, each entry a `Policy` subclass.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from inspect import isabstract

from kvloom.core.policy import Policy

GROUP = "kvloom.policies"
_PACKAGES = ("kvloom.formats", "kvloom.policies")
_PRESETS: dict[str, str] = {}


def _walk(cls: type[Policy]) -> list[type[Policy]]:
    found = [cls]
    for sub in cls.__subclasses__():
        found += _walk(sub)
    return found


def _import_all() -> None:
    for package_name in _PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.walk_packages(package.__path__, package_name + "."):
            importlib.import_module(module.name)


@cache
def _discover() -> dict[str, type[Policy]]:
    _import_all()
    found: dict[str, type[Policy]] = {}
    own = [c for c in _walk(Policy) if c.__module__.startswith("kvloom.") and _concrete(c)]
    foreign = [entry.load() for entry in entry_points(group=GROUP)]
    for cls in [*own, *foreign]:
        if not (isinstance(cls, type) and issubclass(cls, Policy)):
            raise TypeError(f"entry point of {GROUP!r} is {cls!r}, not a Policy subclass")
        if found.get(cls.name, cls) is not cls:
            raise ValueError(f"two policies are called {cls.name!r}: {found[cls.name]} and {cls}")
        found[cls.name] = cls
    return found


def _concrete(cls: type[Policy]) -> bool:
    """A policy that users can name: it stands outside of the base classes' module."""
    bases = ("kvloom.core.policy", "kvloom.core.format", "kvloom.core.merge")
    return cls.__module__ not in bases and not isabstract(cls) and bool(cls.kind)


def policies(kind: str | None = None) -> dict[str, type[Policy]]:
    """All registered policies by name, or those of one kind."""
    found = _discover()
    return {n: c for n, c in sorted(found.items()) if kind is None or c.kind == kind}


def register(cls: type[Policy]) -> type[Policy]:
    """Register a policy by hand (notebooks, tests); usable as a decorator.

    Raises ValueError if another class has the name.
    """
    found = _discover()
    if found.get(cls.name, cls) is not cls:
        raise ValueError(f"two policies are called {cls.name!r}: {found[cls.name]} and {cls}")
    found[cls.name] = cls
    return cls


def presets() -> dict[str, str]:
    """Named recipes: name -> recipe text."""
    _discover()
    return dict(sorted(_PRESETS.items()))


def preset(name: str, text: str) -> None:
    """Name a recipe. Raises ValueError if the name is taken by another recipe."""
    if _PRESETS.get(name, text) != text:
        raise ValueError(f"preset {name!r} is already {_PRESETS[name]!r}")
    _PRESETS[name] = text

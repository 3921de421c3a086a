"""What recipes and tasks as text have in common: parameters that are literals, and hints at a likely name."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from typing import Any


def arguments(call: ast.Call, where: str, rule: str, of: str = "") -> dict[str, Any]:
    """The keywords of a call, each a literal; nothing is evaluated but that.

    Raises ValueError that begins with `where`: with `rule` if something is not written as `name=value`, else
    naming the parameter, followed by `of`.
    """
    if call.args:
        raise ValueError(f"{where}: {rule}")
    given: dict[str, Any] = {}
    for keyword in call.keywords:
        name = keyword.arg
        if name is None:
            raise ValueError(f"{where}: {rule}")
        if name in given:
            raise ValueError(f"{where}: {name}{of} is given twice")
        try:
            given[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise ValueError(
                f"{where}: {name}{of} must be a literal, not {ast.unparse(keyword.value)!r}"
            ) from None
    return given


def hint(word: str, known: Iterable[str]) -> str:
    """`"; did you mean ...?"`, where one of the known names is close; else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

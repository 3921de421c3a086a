"""Write `docs/methods.md` from the docstrings of everything that can stand in a recipe: `make docs`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from kvloom.core import registry
from kvloom.evaluation.recompute import Recompute
from kvloom.policies import presets

PAGE = Path(__file__).with_name("methods.md")
SOURCE = "../src"
KINDS = {
    "scorer": "Scorers: who goes",
    "schedule": "Schedules: when, and how far",
    "allocator": "Allocators: how a budget is split",
    "merger": "Mergers: what becomes of the evicted",
    "format": "Formats: how survivors are stored",
}
INTRO = """\
# Methods

Everything that can stand in a recipe: one file each, with its paper, equation, parameters and every
deviation. A recipe has at most one policy of each kind. `kvloom show NAME` prints the same.

Made from the docstrings by `make docs`; edit those.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO, _contents()]
    for kind, title in KINDS.items():
        parts += [f"## {title}\n", *(_method(c) for c in _classes(kind))]
    return "\n".join([*parts, _presets(), _baseline()])


def _classes(kind: str) -> list[type[Any]]:
    """What kvloom brings; what a notebook or a test registered is not documented here."""
    return [c for c in registry.policies(kind).values() if c.__module__.startswith("kvloom.")]


def _contents() -> str:
    lines = ["| kind | methods |", "|---|---|"]
    for kind in KINDS:
        names = ", ".join(f"[`{c.name}`](#{c.name})" for c in _classes(kind))
        lines.append(f"| {kind} | {names} |")
    return "\n".join([*lines, ""])


def _method(cls: type[Any]) -> str:
    needs = cls.needs if isinstance(cls.needs, frozenset) else cls().needs
    seen = f", needs {', '.join(f'`{n}`' for n in sorted(needs))}" if needs else ""
    path = cls.__module__.replace(".", "/") + ".py"
    head = f"### {cls.name}\n\n`{_signature(cls)}`  \n[{path}]({SOURCE}/{path}){seen}\n"
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return "\n".join([head, _prose(module), _prose(inspect.getdoc(cls) or "", cls)])


def _signature(cls: type[Any]) -> str:
    given = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
    return f"{cls.name}({given})" if given else str(cls.name)


def _presets() -> str:
    lines = [
        "## Presets\n",
        _prose(inspect.getdoc(presets) or ""),
        "| preset | recipe |",
        "|---|---|",
    ]
    for name, text in registry.presets().items():
        lines.append(f"| `{name}` | `{_cell(text)}` |")
    return "\n".join([*lines, ""])


def _baseline() -> str:
    module = inspect.getdoc(sys.modules[Recompute.__module__]) or ""
    own = inspect.getdoc(Recompute) or ""
    return f"## Baseline, for `kvloom compare` only\n\n{_prose(module)}\n{_prose(own, Recompute)}"


def _prose(doc: str, cls: type[Any] | None = None) -> str:
    """A docstring as Markdown: indented equations become blocks, `Attributes:` a table."""
    out = []
    for block in doc.split("\n\n"):
        if cls is not None and block.startswith("Attributes:"):
            out.append(_table(cls, " ".join(block.split()[1:])))
        elif block.startswith("    "):
            out.append(f"```text\n{inspect.cleandoc(block)}\n```")
        else:
            out.append(block)
    text = "\n\n".join(out) + "\n"
    link = r"[arXiv:\1](https://arxiv.org/abs/\1)"
    return re.sub(r"arXiv:\s*(\d{4}\.\d{4,5})", link, text)


def _table(cls: type[Any], text: str) -> str:
    """The parameters, from `name: meaning. other: meaning.`; names are the dataclass's fields."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    _, *found = re.split(rf"(?:^|(?<=\s))({'|'.join(fields)}): ", text)
    meanings = dict(zip(found[::2], found[1::2], strict=True))
    if set(meanings) != set(fields):
        raise ValueError(f"{cls.__name__}: 'Attributes:' must explain exactly {', '.join(fields)}")
    lines = ["| parameter | default | meaning |", "|---|---|---|"]
    for name, meaning in meanings.items():
        lines.append(f"| `{name}` | {_default(fields[name])} | {_cell(meaning.strip(' ,'))} |")
    return "\n".join(lines)


def _default(f: dataclasses.Field[Any]) -> str:
    return "required" if f.default is dataclasses.MISSING else f"`{f.default!r}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

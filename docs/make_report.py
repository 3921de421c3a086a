"""Fill the table of kinds in `docs/report.md` from the kinds themselves: `python docs/make_report.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

from _pages import filled

from kvloom.evaluation.report import kinds

PAGE = Path(__file__).parent / "report.md"


def table() -> str:
    """Markdown: each kind, the first line of its file, its options."""
    out = ["| kind | what it shows | options |", "| --- | --- | --- |"]
    for name, kind in kinds.found().items():
        first = (inspect.getdoc(kind) or "").splitlines()[0]
        options = "<br>".join(f"`{option}`: {what}" for option, what in kind.OPTIONS.items())
        out.append(f"| `{name}` | {first} | {options} |")
    return "\n".join(out)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(filled(page, {"kinds": table()}), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Every row as it stands, in the page: where the numbers of tables lead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from kvloom.evaluation.metrics import METRICS, AnyRow
from kvloom.evaluation.report.html import Html, join, tag
from kvloom.evaluation.results import Row
from kvloom.evaluation.task_results import TaskRow

LEFT_OUT = ("series", "answers", "key")
ANSWERS = 40  # the most examples that the page shows of one row


def anchor(key: str) -> str:
    """The id of a row's element."""
    return f"row-{key[:16]}"


def section(rows: Iterable[AnyRow]) -> Html:
    """One closed element per row, each row once."""
    unique = {row.key: row for row in rows}
    return join(*(_row(row) for row in unique.values()))


def _row(row: AnyRow) -> Html:
    at = f" @ {row.subject.budget}" if row.subject.budget else ""
    on = row.text.name if isinstance(row, Row) else row.task.task
    head = tag(
        "summary",
        tag("code", f"{row.subject.recipe}{at}"),
        f" on {on} ",
        tag("small", row.key[:16]),
    )
    figures = [
        f"{METRICS[name].label} {METRICS[name].show(v)}"
        for name in METRICS
        if (v := METRICS[name].of(row)) is not None
    ]
    terms = [
        tag("dt", "figures"),
        tag("dd", " · ".join(figures)),
        tag("dt", "key"),
        tag("dd", row.key),
    ]
    for name, value in _fields(row).items():
        if name not in LEFT_OUT:
            terms += [tag("dt", name), tag("dd", _shown(value))]
    inside = [head, tag("dl", *terms)]
    if isinstance(row, TaskRow):
        inside.append(_answers(row))
    return tag("details", *inside, id=anchor(row.key), class_="row")


def _fields(row: AnyRow) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.asdict(value).items()  # type: ignore[arg-type]
        return " · ".join(f"{name} {_shown(x)}" for name, x in fields)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "n/a" if value is None else str(value)


def _answers(row: TaskRow) -> Html:
    head = tag("tr", *(tag("th", x) for x in ("score", "depth", "tokens", "written", "expected")))
    lines: Sequence[Html] = [
        tag(
            "tr",
            tag("td", f"{a.score:.2f}"),
            tag("td", "" if a.depth is None else f"{a.depth:.0%}"),
            tag("td", f"{a.tokens:,}"),
            tag("td", _cut(a.generated)),
            tag("td", _cut(" | ".join(a.expected))),
        )
        for a in row.answers[:ANSWERS]
    ]
    more = len(row.answers) - ANSWERS
    rest = [tag("p", f"and {more} more in the file of rows")] if more > 0 else []
    return join(tag("table", head, *lines, class_="answers"), *rest)


def _cut(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."

"""Whether the rows below a table hold equal bytes, budget by budget, over all its texts and tasks."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.evaluation import equal
from kvloom.evaluation.metrics import AnyRow
from kvloom.evaluation.results import Row

SHOWN = 4  # sentences of one kind; more are counted


def statements(rows: Sequence[AnyRow]) -> list[str]:
    """What `equal.remarks` says of rows on the same text or task, said once where it is the same."""
    groups: dict[str, dict[tuple[str, str | None], AnyRow]] = {}
    for row in rows:  # repeats hold the same bytes: one of them will do
        subject = row.subject
        groups.setdefault(_measured_on(row), {})[subject.recipe, subject.budget] = row
    said: dict[str, list[str]] = {}
    for where, held in groups.items():
        for sentence in equal.remarks(list(held.values())):
            said.setdefault(sentence, []).append(where)
    if len(groups) == 1:
        return list(said)
    places = [f"{s.rstrip('.')} ({_count(len(w), len(groups))})." for s, w in said.items()]
    good = [p for p in places if ": equal bytes" in p]
    other = [p for p in places if p not in good]
    more = len(other) - SHOWN
    return good + other[:SHOWN] + ([f"And {more} more of this kind."] if more > 0 else [])


def _measured_on(row: AnyRow) -> str:
    if isinstance(row, Row):
        return f"{row.model.sha256} {row.text.sha256} {row.protocol}"
    return f"{row.model.sha256} {row.task.sha256} {row.task.view}"


def _count(some: int, all_: int) -> str:
    return (
        f"on all {all_} texts and tasks" if some == all_ else f"on {some} of {all_} texts and tasks"
    )

"""Rows of the same budget are compared, so they should hold the same bytes; where not, it is said.

Without a budget, recipes that evict state a size of their own (`streaming_llm(recent=250)`); whether
these hold the same bytes is said as well.

Bytes are those of the compressed layers. Two things excuse a row, and are said too: its floor is above
the budget, or nothing was evicted, so that the budget had no say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from kvloom.evaluation.results import Counts, Subject

TOLERANCE = 0.02
OWN = "No budget, sizes of their own"
SHOWN = 4  # recipes that a sentence names; more are counted


class HeldBytes(Protocol):
    """What `results.Bytes` and `task_results.Held` have in common."""

    @property
    def mean(self) -> float:
        """Of the whole cache."""
        ...

    @property
    def compressed_mean(self) -> float:
        """Of the compressed layers."""
        ...

    @property
    def allowed(self) -> float | None:
        """By the budget; None where it is not in bytes."""
        ...


class Comparable(Protocol):
    """What a row has to tell: `Row` and `TaskRow` do."""

    @property
    def subject(self) -> Subject:
        """What was measured."""
        ...

    @property
    def bytes(self) -> HeldBytes:
        """What it held."""
        ...

    @property
    def counts(self) -> Counts:
        """What it did."""
        ...


AnyRow = TypeVar("AnyRow", bound=Comparable)


def groups(rows: Sequence[AnyRow]) -> dict[str | None, list[AnyRow]]:
    """Rows by budget, those without one first, each in the given order."""
    found: dict[str | None, list[AnyRow]] = {None: []}
    for row in rows:
        found.setdefault(row.subject.budget, []).append(row)
    return {budget: held for budget, held in found.items() if held}


def budget_use(row: Comparable) -> float | None:
    """Mean bytes held / mean bytes allowed; None where the budget is none or not in bytes.

    A percentage is of the compressed layers, bytes are of all.
    """
    b, budget = row.bytes, row.subject.budget
    if not b.allowed:
        return None
    return (b.compressed_mean if budget and budget.endswith("%") else b.mean) / b.allowed


def idle(row: Comparable) -> bool:
    """Whether a recipe that evicts has evicted nothing: the row shows a full cache, or its format."""
    return row.subject.evicts and row.counts.evicted == 0


def above(row: Comparable) -> bool:
    """Whether over 2 % more than allowed is held, as by a share while it is below the floor."""
    return (budget_use(row) or 0) > 1 + TOLERANCE


def unequal(rows: Sequence[Comparable]) -> dict[str, float]:
    """Recipes that hold over 2 % less than the largest of these rows: recipe -> share of it.

    Rows that are excused are left out.
    """
    held = {r.subject.recipe: r.bytes.compressed_mean for r in rows if not (idle(r) or above(r))}
    most = max(held.values(), default=0.0)
    return {recipe: n / most for recipe, n in held.items() if most and n / most < 1 - TOLERANCE}


def require_equal(rows: Sequence[Comparable]) -> None:
    """Assert that rows may stand side by side "at equal bytes": whatever says so must ask first.

    Raises ValueError if they are of several budgets, or differ by over 2 % without an excuse.
    """
    budgets = {row.subject.budget for row in rows}
    if len(budgets) > 1:
        raise ValueError(f"rows of several budgets ({', '.join(sorted(map(str, budgets)))})")
    less = unequal(rows)
    if less:
        listed = ", ".join(f"{recipe} {share - 1:.0%}" for recipe, share in less.items())
        raise ValueError(f"NOT equal bytes; against the largest: {listed}")


def remarks(rows: Sequence[Comparable]) -> list[str]:
    """Whether the rows of each budget hold equal bytes, and what is special about single rows."""
    said = []
    for budget, held in groups(rows).items():
        if budget is None:
            said += _of_own_size(held)
        if budget is None or sum(not (idle(r) or above(r)) for r in held) < 2:
            continue
        try:
            require_equal(held)
            how = ", budgets adjusted until they were" if _matched(held) else ""
            said.append(f"{budget}: equal bytes, within {TOLERANCE:.0%}{how}.")
        except ValueError as error:
            said.append(f"{budget}: {error} ({_why(budget, held)}).")
    for rule, words in (
        (above, "Above their budget, since their floor is higher"),
        (idle, "Never evicted anything here, so these rows show a full cache or its format"),
    ):
        named = [_cell(r) for r in rows if rule(r)]
        if named:
            said.append(f"{words}: {', '.join(named)}.")
    return said


def _of_own_size(rows: Sequence[Comparable]) -> list[str]:
    """Of rows without a budget, whether those that evicted hold equal bytes; nothing of fewer than two."""
    held = [r for r in rows if r.subject.evicts and not (r.subject.baseline or idle(r))]
    if len(held) < 2:
        return []
    less = sorted(unequal(held).items(), key=lambda x: x[1])
    if not less:
        return [f"{OWN}: equal bytes, within {TOLERANCE:.0%}."]
    listed = ", ".join(f"{recipe} {share - 1:.0%}" for recipe, share in less[:SHOWN])
    more = f", and {len(less) - SHOWN} more" if len(less) > SHOWN else ""
    return [f"{OWN}: NOT equal bytes; against the largest: {listed}{more}."]


def _matched(rows: Sequence[Comparable]) -> bool:
    return any(r.subject.matched is not None for r in rows)


def _why(budget: str, rows: Sequence[Comparable]) -> str:
    if _matched(rows):
        return "budgets were adjusted as far as whole pages allow"
    if budget.endswith("tok"):
        return "entries are equal, bytes follow the format"
    return "a budget is a ceiling that whole pages must fit under"


def _cell(row: Comparable) -> str:
    budget = row.subject.budget
    return row.subject.recipe + (f" @ {budget}" if budget else "")

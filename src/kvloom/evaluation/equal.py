"""Rows of the same budget are compared, so they should hold the same bytes; where not, it is said."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.evaluation.results import Row

TOLERANCE = 0.02


def groups(rows: Sequence[Row]) -> dict[str | None, list[Row]]:
    """Rows by budget, those without one first, each in the given order."""
    found: dict[str | None, list[Row]] = {None: []}
    for row in rows:
        found.setdefault(row.subject.budget, []).append(row)
    return {budget: held for budget, held in found.items() if held}


def budget_use(row: Row) -> float | None:
    """Mean bytes held / mean bytes allowed; None where the budget is none or not in bytes."""
    return row.bytes.mean / row.bytes.allowed if row.bytes.allowed else None


def unequal(rows: Sequence[Row]) -> dict[str, float]:
    """Recipes that hold over 2 % less than the largest of these rows: recipe -> share of it."""
    most = max((row.bytes.mean for row in rows), default=0.0)
    shares = {row.subject.recipe: row.bytes.mean / most for row in rows if most}
    return {recipe: share for recipe, share in shares.items() if share < 1 - TOLERANCE}


def above(rows: Sequence[Row]) -> list[str]:
    """Recipes that hold over 2 % more than allowed, which a share does while it is below the floor."""
    return [r.subject.recipe for r in rows if (budget_use(r) or 0) > 1 + TOLERANCE]


def remarks(rows: Sequence[Row]) -> list[str]:
    """One sentence per budget: whether its rows hold equal bytes, and why not."""
    said = []
    for budget, held in groups(rows).items():
        if budget is None or len(held) < 2:
            continue
        less = unequal(held)
        if not less:
            said.append(f"{budget}: equal bytes, within {TOLERANCE:.0%}.")
            continue
        why = (
            "entries are equal, bytes follow the format"
            if budget.endswith("tok")
            else "a budget is a ceiling that whole pages must fit under"
        )
        listed = ", ".join(f"{recipe} {share - 1:.0%}" for recipe, share in less.items())
        said.append(f"{budget}: NOT equal bytes; against the largest: {listed} ({why}).")
    over = above(rows)
    if over:
        said.append(f"Above their budget, since their floor is higher: {', '.join(over)}.")
    return said

"""Budgets that are adjusted until a cache holds the bytes that they say.

A budget is a ceiling at the worst moment, so what methods hold on average under one budget differs: by the spare part
of pages, by what they keep besides. Where rows are to be compared at equal bytes, the cache is given a budget
that is raised or lowered until its mean bytes are those of the cell's own, within 1 %; two rows of a
budget then differ by 2 % at most. Each cell is matched by itself, to what its budget says, so that cells need
not know of each other. The row keeps every try, and what prevented a match where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvloom.core.budget import Budget
from kvloom.evaluation.equal import TOLERANCE
from kvloom.evaluation.results import Matched
from kvloom.evaluation.subjects import Cell

WITHIN = TOLERANCE / 2
TRIES = 6
DIGITS = 4  # of a share that is tried
FLOOR, NOTHING, PAGES = "its floor is above", "nothing is evicted", "whole pages"


@dataclass(frozen=True)
class Probe:
    """What a cache holds under a budget.

    Attributes:
        use: mean bytes held / bytes that the cell's own budget means. floor: the least bytes that the recipe
            needs / the same. evicted: entries.
    """

    use: float
    floor: float
    evicted: int


def check(budget: Budget) -> None:
    """Raise ValueError if a budget cannot be matched in bytes."""
    if budget.kind == "tokens":
        raise ValueError(
            f"equal_bytes: budget {str(budget)!r} counts entries; write a share or bytes"
        )


def given(
    cell: Cell, probe: Callable[[Budget, Budget], Probe]
) -> tuple[Budget | None, Matched | None]:
    """The budget that a cell's caches are given, and how it was matched, if it was; `probe(budget, target)`."""
    target = cell.budget
    if target is None or not cell.equal_bytes:
        return target, None
    return match(target, lambda budget: probe(budget, target))


def match(target: Budget, probe: Callable[[Budget], Probe]) -> tuple[Budget, Matched]:
    """The budget under which most nearly the bytes of `target` are held, and how it was found.

    Args:
        probe: what is held under a budget; called `TRIES` times at most.
    """
    check(target)
    tried: list[tuple[Budget, Probe]] = []
    given, why = target, ""
    while len(tried) < TRIES and given not in [budget for budget, _ in tried]:
        tried.append((given, found := probe(given)))
        why = _hopeless(found)
        if why or abs(found.use - 1) <= WITHIN:
            break
        given = _next(target, tried)
    best, found = min(tried, key=lambda t: abs(t[1].use - 1))
    reached = abs(found.use - 1) <= WITHIN
    matched = Matched(
        given=str(best),
        tried=[str(budget) for budget, _ in tried],
        held=[round(p.use, DIGITS) for _, p in tried],
        reached=reached,
        why=None if reached else why or PAGES,
    )
    return best, matched


def _hopeless(found: Probe) -> str:
    """Why no other budget will do; empty if one may."""
    if found.use > 1 + WITHIN and found.floor > 1:
        return FLOOR
    return NOTHING if found.use < 1 - WITHIN and not found.evicted else ""


def _next(target: Budget, tried: list[tuple[Budget, Probe]]) -> Budget:
    """Between the nearest tries on both sides; with one side only, in proportion, and further each time
    that the last step changed nothing.
    """
    below = [(b.amount, p.use) for b, p in tried if p.use < 1]
    above = [(b.amount, p.use) for b, p in tried if p.use >= 1]
    if below and above:
        (low, at_low), (high, at_high) = max(below), min(above)
        between = min(0.9, max(0.1, (1 - at_low) / max(at_high - at_low, 1e-9)))
        amount = low + between * (high - low)
    else:
        amount, use = max(below) if below else min(above)
        amount /= use ** sum(abs(p.use - use) < 1e-4 for _, p in tried)
    amount = float(f"{amount:.{DIGITS}g}") if target.kind == "share" else float(round(amount))
    return replace(target, amount=amount)

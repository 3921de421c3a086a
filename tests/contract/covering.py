"""Covering arrays: few cases in which all values, or all pairs of values, of some factors occur."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

Case = dict[str, str]


def covering(
    factors: Mapping[str, Sequence[str]],
    strength: int,
    allowed: Callable[[Case], bool] = lambda case: True,
) -> list[tuple[str, ...]]:
    """Cases that contain every allowed combination of values of any `strength` factors.

    Greedy and deterministic: a case starts from the first combination that is still missing, and
    takes for every other factor the value that covers most of what is missing. `allowed` judges
    partial cases; a partial case that it allows can always be completed.
    """
    missing = {
        frozenset(zip(names, values, strict=True)): None
        for names in combinations(factors, strength)
        for values in product(*(factors[name] for name in names))
        if allowed(dict(zip(names, values, strict=True)))
    }
    used = {(name, value): 0 for name, values in factors.items() for value in values}
    chosen = []
    while missing:
        case = dict(next(iter(missing)))
        # the long factors first: their values need most cases
        for name in sorted(factors, key=lambda n: -len(factors[n])):
            if name in case:
                continue
            options = [v for v in factors[name] if allowed({**case, name: v})]
            case[name] = max(
                options, key=lambda v: (_gain(missing, case, (name, v), strength), -used[name, v])
            )
        for item in case.items():
            used[item] += 1
        for names in combinations(factors, strength):
            missing.pop(frozenset((name, case[name]) for name in names), None)
        chosen.append(tuple(case[name] for name in factors))
    return chosen


def _gain(missing: dict, case: Case, item: tuple[str, str], strength: int) -> int:
    """How many missing combinations `item` completes together with what the case has already."""
    return sum(
        frozenset([*others, item]) in missing for others in combinations(case.items(), strength - 1)
    )

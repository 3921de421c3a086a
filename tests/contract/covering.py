"""A pairwise covering array: every pair of values of two factors occurs in some case."""

from __future__ import annotations

from itertools import combinations, product


def pairwise(factors: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """Greedy and deterministic: repeatedly take the case that covers most uncovered pairs."""
    names = list(factors)
    cases = list(product(*factors.values()))
    missing = {
        (i, a, j, b)
        for i, j in combinations(range(len(names)), 2)
        for a in factors[names[i]]
        for b in factors[names[j]]
    }
    pairs = {
        case: [(i, case[i], j, case[j]) for i, j in combinations(range(len(names)), 2)]
        for case in cases
    }
    chosen = []
    while missing:
        best = max(cases, key=lambda case: sum(pair in missing for pair in pairs[case]))
        chosen.append(best)
        missing.difference_update(pairs[best])
    return chosen

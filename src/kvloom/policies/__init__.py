"""Policies: `evict` (scorers), `allocate` (budgets over layers and heads), `merge` (losers)."""

"""Uniform: every layer and every KV head gets the same budget.

b_lh = B / (L H)
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.core.policy import Allocator


@dataclass(frozen=True)
class Uniform(Allocator):
    """Equal budgets, as without an allocator; for tables that name the allocator of every row."""

"""A policy as another package would bring it."""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.core.policy import Policy


@dataclass(frozen=True)
class Newest(Policy):
    """Stands for a scorer from elsewhere."""

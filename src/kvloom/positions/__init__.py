"""Rotary positions: the only place that knows RoPE."""

from kvloom.positions.rope import RopeSpec

__all__ = ["RopeSpec"]

"""How answers are scored, each 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.testbed.tasks import answers


def exact(generated: str, answer: str) -> float:
    """Whether the answer comes first and does not run on."""
    return float(answers(generated, answer))


def contained(generated: str, wanted: Sequence[str]) -> float:
    """Share of the wanted strings that occur, whatever their case (RULER's `string_match_all`)."""
    said = generated.lower()
    return sum(w.lower() in said for w in wanted) / len(wanted)

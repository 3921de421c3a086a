"""How the contract suite runs whatever is registered: one small setting per policy."""

from __future__ import annotations

from kvloom.core import registry
from kvloom.core.policy import Scorer

CAPACITY = 90  # entries per head: below the prompt, above a page, so that sealed entries go too


def formats() -> list[str]:
    """Every registered format, and the pre-RoPE variant of dense."""
    return [*registry.policies("format"), "dense(rope='pre')"]


def scorers() -> list[str]:
    """Every registered scorer; methods with modes may add them here."""
    return [*registry.policies("scorer"), "streaming_llm(positions='original')"]


def with_size(scorer: str) -> tuple[str, str | None]:
    """`(recipe text, budget)` that makes `scorer` hold CAPACITY entries per head."""
    policy = registry_parse(scorer)
    return scorer, None if policy.capacity is not None else f"{CAPACITY}tok"


def registry_parse(text: str) -> Scorer:
    from kvloom.core.recipe import Recipe

    scorer = Recipe.parse(text).scorer
    assert scorer is not None
    return scorer

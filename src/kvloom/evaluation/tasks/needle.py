"""Needles in a haystack: facts planted in a long text, one of which is asked for.

Source: Kamradt, "Needle in a haystack" (2023, github.com/gkamradt/LLMTest_NeedleInAHaystack). Deviation:
facts are drawn from a vocabulary and phrasings with a seed, so that no model knows them, and the answer
must come first and exactly, where the original has a model judge it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.evaluation.tasks import scoring
from kvloom.evaluation.tasks.base import (
    LEAST,
    Example,
    Measure,
    Task,
    new_tokens,
    parameter,
    spread,
)
from kvloom.testbed import tasks


@dataclass(frozen=True)
class Needle(Task):
    """Facts in a text, e.g. `needle(length=2048, depth=0.5)`.

    Attributes:
        length: tokens of a prompt at most. depth: where the asked fact stands; None: spread evenly over
            the examples. facts: how many are planted; the others stand anywhere. unseen: in phrasings that
            the testbed model was not trained on. words: they are words, not five digits.
        examples: how many. seed: of facts, phrasings, filler.
    """

    name = "needle"
    family = "needle"
    metric = "exact"

    length: int = parameter(2048, least=LEAST)
    depth: float | None = parameter(None, most=1)
    facts: int = parameter(1, least=1)
    unseen: bool = False
    words: bool = False
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        made = []
        for i in range(self.examples):
            depth = spread(i, self.examples) if self.depth is None else self.depth
            task = tasks.needle(
                self.seed * 1000 + i, filler, self.length, measure,
                facts=self.facts, depth=depth, unseen=self.unseen, words=self.words,
            )  # fmt: skip
            room = new_tokens(measure, task.answer)
            made.append(Example(task.context, task.question, (task.answer,), room, depth))
        sizes = [measure(e.context) + measure(e.question) for e in made]
        if max(sizes) > self.length:
            raise ValueError(f"{self}: the facts alone take {max(sizes)} tokens; give more length")
        shortest = min(sizes)
        if shortest < 0.9 * self.length - 20:  # some tokens are kept spare
            raise ValueError(
                f"the text is too short for needle tasks of {self.length} tokens (one has {shortest}): "
                "use a longer text, shorter tasks or none"
            )
        return made

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.exact(generated, example.answers[0])

    @property
    def filler_tokens(self) -> int:
        """See `Task`."""
        return self.length

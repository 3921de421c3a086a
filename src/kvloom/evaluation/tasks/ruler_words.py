"""RULER's aggregation: the most common words of a list, the most frequent words of a coded text.

Source: Hsieh et al., "RULER" (arXiv:2404.06654), its common and frequent words extraction, whose defaults
are ours. Scored as there: the share of the answers that occur.

Deviations: our own wording; no solved example before the question; common words are drawn from compounds of
our vocabulary ("riverlamp"), since no dictionary is bundled; `length` is of the prompt, without what is
generated.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from kvloom.evaluation.tasks import scoring
from kvloom.evaluation.tasks._build import COMPOUNDS, fit_count, prompt_tokens
from kvloom.evaluation.tasks.base import LEAST, Example, Measure, Task, new_tokens, parameter

SHORT = 4096  # tokens below which RULER repeats words less often
LETTERS = 6  # of a coded word
NOISE = "..."  # stands for the most frequent coded word
ASKED = 3  # coded words
PER_WORD = 50  # tokens of a prompt for each coded word that exists


@dataclass(frozen=True)
class CommonWords(Task):
    """A numbered list of words, few of them often; which are these?

    Attributes:
        length: tokens of a prompt at most. common: how many words are asked for. often: times that each of
            them stands there; None: 30, or 6 below 4096 tokens. seldom: times that others do; None: 3, or 1.
        examples: how many. seed: of words and order.
    """

    name = "common_words"
    family = "ruler"
    metric = "contained"

    length: int = parameter(4096, least=LEAST)
    common: int = parameter(10, least=1)
    often: int | None = parameter(None, least=2)
    seldom: int | None = parameter(None, least=1)
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        often, seldom = self._times()
        if often <= seldom:
            raise ValueError(f"{self}: often ({often}) must be above seldom ({seldom})")

    def _times(self) -> tuple[int, int]:
        often, seldom = (30, 3) if self.length >= SHORT else (6, 1)
        return self.often or often, self.seldom or seldom

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        return [self._example(i, measure) for i in range(self.examples)]

    def _example(self, i: int, measure: Measure) -> Example:
        words = COMPOUNDS.copy()
        random.Random(f"{self.name} {self.seed} {i}").shuffle(words)
        answers, others = words[: self.common], words[self.common :]
        often, seldom = self._times()
        question = (
            f"\nQuestion: Which {self.common} words are the most common ones in the list above?\n"
            f"Answer: The {self.common} words that the list has most often are:"
        )

        def context(count: int) -> str:
            listed = answers * often + others[:count] * seldom
            random.Random(f"order {self.seed} {i}").shuffle(listed)
            numbered = " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))
            return f"This is a numbered list of words. Some stand in it more often.\n\n{numbered}\n"

        count = _fitting(self, context, question, measure, len(others))
        new = max(120, new_tokens(measure, ", ".join(answers)))
        return Example(context(count), question, tuple(answers), new)

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.contained(generated, example.answers)


@dataclass(frozen=True)
class FrequentWords(Task):
    """A text of coded words whose frequencies follow a zeta distribution; which three are most frequent?

    The k-th word stands there `floor(n k^-alpha / zeta(alpha))` times, in random order; the first is written
    "..." and does not count.

    Attributes:
        length: tokens of a prompt at most. alpha: of the distribution, above 1. examples: how many.
        seed: of words and order.
    """

    name = "frequent_words"
    family = "ruler"
    metric = "contained"

    length: int = parameter(4096, least=LEAST)
    alpha: float = parameter(2.0, least=1.1)
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        return [self._example(i, measure) for i in range(self.examples)]

    def _example(self, i: int, measure: Measure) -> Example:
        rng = random.Random(f"{self.name} {self.seed} {i}")
        words = _coded(rng, max(2 * ASKED, self.length // PER_WORD))
        answers = tuple(words[:ASKED])
        zeta = _zeta(self.alpha)

        def times(count: int) -> list[int]:
            return [int(count * k**-self.alpha / zeta) for k in range(1, len(words) + 2)]

        def context(count: int) -> str:
            repeated = zip([NOISE, *words], times(count), strict=True)
            listed = [word for word, n in repeated for _ in range(n)]
            random.Random(f"order {self.seed} {i}").shuffle(listed)
            return f"Read this coded text and keep count of how often each word occurs.\n\n{' '.join(listed)}\n"

        question = (
            f"\nQuestion: Which three words occur most often in the coded text above? Ignore '{NOISE}'.\n"
            "Answer: The three words that occur most often are:"
        )
        count = _fitting(self, context, question, measure)
        last, runner_up = times(count)[ASKED : ASKED + 2]
        if last == runner_up:
            raise ValueError(
                f"{self}: in a text of {count} words the third and the fourth are equally frequent; "
                "give more length"
            )
        new = max(50, new_tokens(measure, ", ".join(answers)))
        return Example(context(count), question, answers, new)

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.contained(generated, example.answers)


def _fitting(
    task: CommonWords | FrequentWords, context: Callable[[int], str], question: str,
    measure: Measure, most: int = 1 << 24,
) -> int:  # fmt: skip
    """How many words there is room for."""
    try:
        return fit_count(
            lambda n: prompt_tokens(measure, context(n), question), task.length, 1, most
        )
    except ValueError as error:
        raise ValueError(f"{task}: {error}; give more length") from None


def _coded(rng: random.Random, count: int) -> list[str]:
    """Distinct words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(string.ascii_lowercase) for _ in range(LETTERS))] = None
    return list(found)


def _zeta(alpha: float, terms: int = 1000) -> float:
    """Riemann's zeta function: a sum, and the integral of its rest with half the first term added."""
    rest = terms ** (1 - alpha) / (alpha - 1) - terms**-alpha / 2
    return sum(k**-alpha for k in range(1, terms + 1)) + rest

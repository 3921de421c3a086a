"""RULER's variable tracking: which variables have a value, through a chain of assignments.

Source: Hsieh et al., "RULER" (arXiv:2404.06654), its variable tracking, of which the defaults are: one chain
of four hops. Scored as there: the share of the answers that occur.

Deviations: our own wording; no solved example before the question; `length` is of the prompt, without what
is generated.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from kvloom.evaluation.tasks import scoring
from kvloom.evaluation.tasks._build import EDGES, haystack, prompt_tokens
from kvloom.evaluation.tasks.base import LEAST, Example, Measure, Task, new_tokens, parameter
from kvloom.testbed.tasks import plant

NEW_TOKENS = 30  # as RULER generates
INTRO = "Follow the assignments of variables that are hidden in the following text.\n\n"
QUESTION = (
    "\n\nQuestion: Which variables in the text above have the value {value}?\n"
    "Answer: By the assignments in the text, these {count} variables have the value {value}:"
)


@dataclass(frozen=True)
class VariableTracking(Task):
    """`VAR ABCDE = 12345`, `VAR FGHIJ = VAR ABCDE`, and so on, in order, all over a text.

    Attributes:
        length: tokens of a prompt at most. chains: how many; the first one's value is asked for. hops: how
            often it is handed on. haystack: `"noise"`, one passage over and over, or `"text"`, the caller's.
        examples: how many. seed: of all that is drawn.
    """

    name = "variable_tracking"
    family = "ruler"
    metric = "contained"

    length: int = parameter(4096, least=LEAST)
    chains: int = parameter(1, least=1)
    hops: int = parameter(4, least=1)
    haystack: str = parameter("noise", choices=("noise", "text"))
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        return [self._example(i, measure, filler) for i in range(self.examples)]

    def _example(self, i: int, measure: Measure, filler: str) -> Example:
        rng = random.Random(f"{self.name} {self.seed} {i}")
        values = rng.sample(range(10000, 100000), self.chains)
        chains = _variables(rng, self.chains, self.hops + 1)
        said, depths = [], []
        for value, chain in zip(values, chains, strict=True):
            sources = [str(value), *(f"VAR {name}" for name in chain)]
            said += [f"\nVAR {a} = {b}\n" for a, b in zip(chain, sources, strict=False)]
            depths += sorted(rng.random() for _ in chain)
        question = QUESTION.format(value=values[0], count=len(chains[0]))
        room = self.length - prompt_tokens(measure, INTRO, question, *said) - EDGES
        text = haystack(self.haystack, rng, filler, room, measure)
        answers = tuple(chains[0])
        new = max(NEW_TOKENS, new_tokens(measure, ", ".join(answers)))
        return Example(INTRO + plant(text, said, depths), question, answers, new)

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.contained(generated, example.answers)

    @property
    def filler_tokens(self) -> int:
        """See `Task`."""
        return self.length if self.haystack == "text" else 0


def _variables(rng: random.Random, chains: int, each: int) -> list[list[str]]:
    """Distinct names of five capitals."""
    found: dict[str, None] = {}
    while len(found) < chains * each:
        found["".join(rng.choice(string.ascii_uppercase) for _ in range(5))] = None
    listed = list(found)
    return [listed[i * each : (i + 1) * each] for i in range(chains)]

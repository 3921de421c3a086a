"""Key-value retrieval: a register of random keys, one of which is asked for.

Source: the synthetic key-value task of Liu et al., "Lost in the middle" (arXiv:2307.03172). Deviation:
keys and values are short (`river-lamp: 52718`) and stand in lines, so that small models can do it;
`uuid_key_value` is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.evaluation.tasks import scoring
from kvloom.evaluation.tasks._build import fit_count, prompt_tokens
from kvloom.evaluation.tasks.base import (
    LEAST,
    Example,
    Measure,
    Task,
    new_tokens,
    parameter,
    spread,
)
from kvloom.testbed import phrases, tasks

LENGTH = 2048
MOST = len(phrases.WORDS) * len(phrases.THINGS)  # distinct keys


@dataclass(frozen=True)
class KeyValue(Task):
    """A register, e.g. `key_value(length=1024)`.

    Attributes:
        length: tokens of a prompt at most; None: 2048, unless `pairs` says how many there are. pairs: None:
            as many as there is room for. depth: where the asked pair stands; None: spread evenly over the
            examples. words: values are words, not five digits. examples: how many. seed: of all pairs.
    """

    name = "key_value"
    family = "key_value"
    metric = "exact"

    length: int | None = parameter(None, least=LEAST)
    pairs: int | None = parameter(None, least=1)
    depth: float | None = parameter(None, most=1)
    words: bool = False
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None and self.pairs is not None:
            raise ValueError(f"{self}: give length or pairs, not both")
        if self.pairs is not None and self.pairs > MOST:
            raise ValueError(f"{self}: pairs must be at most {MOST}, the number of keys")

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        made = []
        for i in range(self.examples):
            depth = spread(i, self.examples) if self.depth is None else self.depth
            seed = self.seed * 1000 + i

            def task(pairs: int, seed: int = seed, depth: float = depth) -> tasks.Task:
                return tasks.key_value(seed, pairs, depth=depth, words=self.words)

            def size(pairs: int, of=task) -> int:
                return prompt_tokens(measure, of(pairs).context, of(pairs).question)

            found = task(self.pairs or fit_count(size, self.length or LENGTH, most=MOST))
            room = new_tokens(measure, found.answer)
            made.append(Example(found.context, found.question, (found.answer,), room, found.depth))
        return made

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.exact(generated, example.answers[0])

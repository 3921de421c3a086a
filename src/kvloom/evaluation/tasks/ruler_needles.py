"""RULER's needles in a haystack: one, one among others, several values, several questions.

Source: Hsieh et al., "RULER: What's the real context size of your long-context language models?"
(arXiv:2404.06654), its niah tasks; defaults are those of its `niah_single_2`, `niah_multikey_1`,
`niah_multivalue` and `niah_multiquery`. Scored as there: the share of the answers that occur.

Deviations: our own wording; keys are pairs of our vocabulary's words; the prose around the needles is the
text that the caller gives, where RULER has one author's essays; `length` is of the prompt, without what is
generated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvloom.evaluation.tasks import scoring
from kvloom.evaluation.tasks._build import (
    EDGES,
    NAMES,
    fit_count,
    haystack,
    lines_of,
    names,
    prompt_tokens,
    uuid,
)
from kvloom.evaluation.tasks.base import LEAST, Example, Measure, Task, new_tokens, parameter
from kvloom.testbed import phrases
from kvloom.testbed.tasks import number, plant

NEW_TOKENS = 128  # as RULER generates
DIGITS = 7
INTRO = "Some secret {kind}s are hidden in the following text. Keep them in mind; they will be asked for.\n\n"
STATEMENT = "One of the secret {kind}s for {key} is: {value}."
QUESTION = (
    "\n\nWhich secret {kind}s for {keys} does the text give? The secret {kind}s for {keys} are"
)


@dataclass(frozen=True)
class _Planted:
    """What one example hides: facts (key, value) that are asked for, and others."""

    asked: list[tuple[str, str]]
    others: list[tuple[str, str]]

    @property
    def keys(self) -> str:
        """The keys asked for, as a question names them."""
        *most, last = dict(self.asked)
        return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True)
class _Needles(Task):
    """What the four have in common; see `NiahSingle` for the parameters."""

    family = "ruler"
    metric = "contained"

    length: int = parameter(4096, least=LEAST)
    haystack: str = parameter("text", choices=("text", "noise", "needles"))
    value: str = parameter("number", choices=("number", "word", "uuid"))
    key: str = parameter("words", choices=("words", "uuid"))
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value == "word" and self.needles > len(phrases.WORDS):
            raise ValueError(
                f"{self}: {self.needles} distinct values: there are {len(phrases.WORDS)} words; take "
                "fewer, or numbers or UUIDs"
            )
        if self.key == "words" and self.named > NAMES:
            raise ValueError(f"{self}: {self.named} distinct keys: there are {NAMES}; take UUIDs")

    @property
    def needles(self) -> int:
        """How many are planted, each with a value of its own."""
        return 1

    @property
    def named(self) -> int:
        """How many keys they have between them."""
        return self.needles

    def _facts(self, rng: random.Random) -> _Planted:
        raise NotImplementedError

    def _keys(self, rng: random.Random, count: int) -> list[str]:
        return names(rng, count) if self.key == "words" else [uuid(rng) for _ in range(count)]

    def _value(self, rng: random.Random) -> str:
        if self.value == "uuid":
            return uuid(rng)
        return rng.choice(phrases.WORDS) if self.value == "word" else number(rng, DIGITS)

    def _values(self, rng: random.Random, count: int) -> list[str]:
        """Distinct values, so that each answer counts by itself."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self._value(rng)] = None
        return list(found)

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        made = []
        for i in range(self.examples):
            rng = random.Random(f"{self.name} {self.seed} {i}")
            facts = self._facts(rng)
            answers = tuple(value for _, value in facts.asked)
            question = QUESTION.format(kind=self.value, keys=facts.keys)
            context, depth = self._context(rng, facts, question, measure, filler)
            room = max(NEW_TOKENS, new_tokens(measure, ", ".join(answers)))
            made.append(Example(context, question, answers, room, depth))
        return made

    def _context(
        self, rng: random.Random, facts: _Planted, question: str, measure: Measure, filler: str
    ) -> tuple[str, float | None]:
        intro = INTRO.format(kind=self.value)
        said = [self._say(*fact) for fact in (*facts.asked, *facts.others)]
        depths = [rng.random() for _ in said]
        where = depths[0] if len(facts.asked) == 1 else None
        if self.haystack == "needles":
            return intro + self._among(rng, said, depths, intro + question, measure), where
        said = [f"\n{statement}\n" for statement in said]
        taken = prompt_tokens(measure, intro, question, *said) + EDGES
        text = haystack(self.haystack, rng, filler, self.length - taken, measure)
        return intro + plant(text, said, depths), where

    def _say(self, key: str, value: str) -> str:
        return STATEMENT.format(kind=self.value, key=key, value=value)

    def _among(
        self, rng: random.Random, said: list[str], depths: list[float], rest: str, measure: Measure
    ) -> str:
        """The statements in lines of others of the same form, whose keys are nobody else's."""
        seed = rng.random()

        def lines(count: int) -> str:
            own = random.Random(seed)
            hay = [self._say(self._hay_key(own), self._value(own)) for _ in range(count)]
            for depth, statement in sorted(zip(depths, said, strict=True), reverse=True):
                hay.insert(round(depth * count), statement)
            return lines_of(hay)

        count = fit_count(lambda n: prompt_tokens(measure, lines(n), rest) + EDGES, self.length)
        return lines(count)

    def _hay_key(self, rng: random.Random) -> str:
        """A key of three words, as none that is asked for has, or a UUID."""
        if self.key == "uuid":
            return uuid(rng)
        return "-".join(
            rng.choice(words) for words in (phrases.WORDS, phrases.WORDS, phrases.THINGS)
        )

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.contained(generated, example.answers)

    @property
    def filler_tokens(self) -> int:
        """See `Task`."""
        return self.length if self.haystack == "text" else 0


@dataclass(frozen=True)
class NiahSingle(_Needles):
    """One needle.

    Attributes:
        length: tokens of a prompt at most. haystack: `"text"`, the caller's; `"noise"`, one passage over and
            over; `"needles"`, facts of the same form. value: what is asked for. key: what it belongs to.
        examples: how many. seed: of all that is drawn.
    """

    name = "niah_single"

    def _facts(self, rng: random.Random) -> _Planted:
        (key,) = self._keys(rng, 1)
        return _Planted([(key, self._value(rng))], [])


@dataclass(frozen=True)
class NiahMultikey(_Needles):
    """One needle is asked for, among `keys` of them; the rest as for `niah_single`."""

    name = "niah_multikey"
    keys: int = parameter(4, least=2)

    @property
    def needles(self) -> int:
        """See `_Needles`."""
        return self.keys

    def _facts(self, rng: random.Random) -> _Planted:
        values = self._values(rng, self.keys)
        first, *others = zip(self._keys(rng, self.keys), values, strict=True)
        return _Planted([first], others)


@dataclass(frozen=True)
class NiahMultivalue(_Needles):
    """One key has several `values`, all of which are asked for; the rest as for `niah_single`."""

    name = "niah_multivalue"
    values: int = parameter(4, least=2)

    @property
    def needles(self) -> int:
        """See `_Needles`."""
        return self.values

    @property
    def named(self) -> int:
        """See `_Needles`."""
        return 1

    def _facts(self, rng: random.Random) -> _Planted:
        (key,) = self._keys(rng, 1)
        return _Planted([(key, value) for value in self._values(rng, self.values)], [])


@dataclass(frozen=True)
class NiahMultiquery(_Needles):
    """Several keys are asked for at once: `queries`; the rest as for `niah_single`."""

    name = "niah_multiquery"
    queries: int = parameter(4, least=2)

    @property
    def needles(self) -> int:
        """See `_Needles`."""
        return self.queries

    def _facts(self, rng: random.Random) -> _Planted:
        values = self._values(rng, self.queries)
        return _Planted(list(zip(self._keys(rng, self.queries), values, strict=True)), [])

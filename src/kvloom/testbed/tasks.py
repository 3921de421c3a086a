"""Seeded retrieval tasks as plain text: planted facts in a long text, and key-value lists.

Nothing here knows a tokenizer. A caller that wants a prompt of a given token length passes a
``measure`` that counts tokens; the filler is then cut so that the prompt just fits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvloom.testbed import phrases
from kvloom.testbed.phrases import Fact

Measure = Callable[[str], int]


@dataclass(frozen=True)
class Task:
    """``context`` holds the answer, ``question`` asks for it, ``answer`` completes the question.

    Context and question are apart so that the context can be compressed before the question is
    seen. ``depth`` is where the asked fact stands, 0 at the start of the context and 1 at its end.
    """

    context: str
    question: str
    answer: str
    depth: float
    facts: int

    @property
    def prompt(self) -> str:
        return self.context + self.question

    def correct(self, generated: str) -> bool:
        """Exact match; see `answers`."""
        return answers(generated, self.answer)


def answers(generated: str, answer: str) -> bool:
    """Whether the answer comes first and does not run on."""
    rest = generated.strip()
    follows = rest[len(answer) : len(answer) + 1]
    return rest.startswith(answer) and not follows.isalnum()


def number(rng: random.Random, digits: int = 5) -> str:
    """Random decimal digits; leading zeros are possible."""
    return "".join(rng.choice("0123456789") for _ in range(digits))


def random_facts(rng: random.Random, count: int, words: bool = False) -> list[Fact]:
    """Facts about distinct (name, thing) pairs: five-digit numbers, or common words."""
    pairs = rng.sample([(n, t) for n in phrases.NAMES for t in phrases.THINGS], count)
    if words:
        return [Fact(n, t, "word", rng.choice(phrases.WORDS)) for n, t in pairs]
    return [Fact(n, t, "number", number(rng)) for n, t in pairs]


def needle(
    seed: int,
    filler: str,
    length: int,
    measure: Measure = len,
    *,
    facts: int = 1,
    depth: float | None = None,
    unseen: bool = False,
    words: bool = False,
) -> Task:
    """Plant ``facts`` in a stretch of ``filler`` and ask for one of them.

    The whole prompt measures at most ``length``. The asked fact stands at ``depth`` (drawn if not
    given), the others anywhere. ``unseen`` uses only phrasings that training never saw as a whole, for
    the statement and for the question.
    """
    rng = random.Random(f"needle {seed}")
    planted = random_facts(rng, facts, words)
    asked, where = planted[0], rng.random() if depth is None else depth
    depths = [where, *(rng.random() for _ in planted[1:])]
    states = phrases.UNSEEN_STATEMENTS if unseen else phrases.STATEMENTS
    asks = phrases.UNSEEN_QUESTIONS if unseen else phrases.QUESTIONS + phrases.STATEMENTS
    statements = [f"\n{fact.state(rng.choice(states))}\n" for fact in planted]
    question = f"\n{asked.prefix(rng.choice(asks))}"
    # 12 spare tokens: the answer itself, and merges that differ where pieces meet.
    room = length - measure("".join(statements) + question) - 12
    start = rng.randrange(max(1, len(filler) // 2))
    context = plant(fit(filler[start:], room, measure), statements, depths)
    return Task(context, question, asked.value, where, facts)


def plant(text: str, statements: Sequence[str], depths: Sequence[float]) -> str:
    """Insert each statement at its relative depth, at the next gap between words."""
    pieces, last = [], 0
    for depth, statement in sorted(zip(depths, statements, strict=True)):
        cut = max(last, _gap(text, round(depth * len(text))))
        pieces += [text[last:cut], statement]
        last = cut
    return "".join([*pieces, text[last:]])


def fit(text: str, room: int, measure: Measure) -> str:
    """A prefix of ``text``, cut between words, that measures just under ``room``.

    Within a hundredth: few measurements count more than the last words.
    """
    high = min(len(text), max(0, room) * 12)
    cut = longest(lambda n: measure(text[:n]), high, room)
    return text[:cut] if cut == high else text[:cut].rpartition(" ")[0]


def longest(size: Callable[[int], int], most: int, room: int) -> int:
    """The largest ``n`` up to ``most`` with ``size(n) <= room``, where sizes grow with ``n``.

    By interpolation, within a hundredth, since taking a size may mean tokenising.
    """
    low, low_size, high = 0, 0, most
    high_size = size(high)
    if high_size <= room:
        return high
    while high - low > 1 and room - low_size > room / 100:
        guess = low + (high - low) * (room - low_size) // (high_size - low_size)
        cut = min(max(guess, low + 1), high - 1)
        taken = size(cut)
        if taken <= room:
            low, low_size = cut, taken
        else:
            high, high_size = cut, taken
    return low


def _gap(text: str, at: int) -> int:
    gap = text.find(" ", at)
    return len(text) if gap < 0 else gap


def key_value(seed: int, pairs: int, *, depth: float | None = None, words: bool = False) -> Task:
    """A list of ``key: value`` lines with random keys; the question repeats one key."""
    rng = random.Random(f"key-value {seed}")
    keys = rng.sample([f"{a}-{b}" for a in phrases.WORDS for b in phrases.THINGS], pairs)
    values = [rng.choice(phrases.WORDS) if words else number(rng) for _ in keys]
    asked = rng.randrange(pairs) if depth is None else round(depth * (pairs - 1))
    lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    where = asked / max(1, pairs - 1)
    return Task("Register:\n" + lines, f"\n{keys[asked]}:", values[asked], where, pairs)

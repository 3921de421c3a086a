"""What generated tasks are made of: haystacks, names, and as many items as a length has room for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvloom.evaluation.tasks.base import Measure
from kvloom.testbed import phrases
from kvloom.testbed.tasks import fit, longest

# the noise of the pass-key task (Mohtashami & Jaggi, arXiv:2305.16300), which RULER took over
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
EDGES = 12  # tokens kept spare: special ones, and merges that differ where pieces meet
_HYPHENATED = [f"{a}-{b}" for a in phrases.WORDS for b in phrases.THINGS]
NAMES = len(_HYPHENATED)  # how many distinct names there are
COMPOUNDS = sorted({a + b for a in phrases.WORDS for b in phrases.THINGS})


def names(rng: random.Random, count: int) -> list[str]:
    """Distinct names of two words, `"river-lamp"`. Raises ValueError if there are not so many."""
    if count > NAMES:
        raise ValueError(f"{count} names: there are {NAMES}")
    return rng.sample(_HYPHENATED, count)


def uuid(rng: random.Random) -> str:
    """A random UUID of version 4."""
    digits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def haystack(kind: str, rng: random.Random, filler: str, room: int, measure: Measure) -> str:
    """Text of just under `room` tokens: `"noise"`, or a stretch of the filler.

    Raises ValueError if there is no room, or the filler is too short.
    """
    if room < 1:
        raise ValueError(
            f"the facts and the question alone take {1 - room} tokens more than there is room for; give "
            "more length"
        )
    text = NOISE * (1 + room) if kind == "noise" else filler[rng.randrange(len(filler) // 2 + 1) :]
    found = fit(text, room, measure)
    if measure(found) < 0.9 * room - EDGES:
        raise ValueError(
            f"the text is too short: {measure(found)} tokens of it for a haystack of {room}; use a "
            "longer text or shorter tasks"
        )
    return found


def fit_count(size: Callable[[int], int], room: int, least: int = 1, most: int = 1 << 24) -> int:
    """The largest `n` between `least` and `most` with `size(n) <= room`, to a hundredth.

    Raises ValueError if not even `least` fits. Sizes grow with `n`; few are asked for, since measuring
    may mean tokenising.
    """
    if size(least) > room:
        raise ValueError(f"{room} tokens have no room: the least takes {size(least)}")
    low, high = least, 2 * least
    while high <= most and size(high) <= room:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= room else (low, middle)
    return low


def prompt_tokens(measure: Measure, *pieces: str) -> int:
    """What a prompt of these pieces takes at most, a special token included."""
    return sum(measure(piece) for piece in pieces) + 1


def lines_of(items: Sequence[str]) -> str:
    """One item per line."""
    return "".join(f"{item}\n" for item in items)


def cut_middle(context: str, question: str, length: int, measure: Measure) -> tuple[str, str]:
    """Context and question without so much of the middle of both together that `length` tokens stay.

    Half of what stays is before the cut, half behind it: the cut is in the context, unless the question
    alone is longer than half.
    """
    if measure(context) + measure(question) <= length:
        return context, question
    n, asked = len(context), measure(question)
    head = length // 2
    tail = length - head
    if asked > tail:
        kept = longest(lambda k: measure(question[len(question) - k :]), len(question), tail)
        return context[: longest(lambda k: measure(context[:k]), n, head)], question[-kept:]
    behind = longest(lambda k: measure(context[n - k :]), n, tail - asked)
    while True:  # tokens may merge otherwise where both parts meet
        before = longest(lambda k: measure(context[:k]), n, head)
        cut = context[:before] + context[n - behind :]
        over = measure(cut) + asked - length
        if over <= 0:
            return cut, question
        head -= over

"""What the model sees: natural text, and sequences that can only be predicted by looking back.

Every kind returns ``length + 1`` tokens with a weight each: how much predicting this token counts.
Weight 0 masks what nobody could predict (a fresh number, a random key), so that the loss of a
synthetic sequence is about retrieval alone. A batch is a pure function of (seed, step): a resumed
run needs no generator state, and worker processes may build batches in any order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvloom.testbed import phrases
from kvloom.testbed.phrases import Fact
from training import phrasings
from training.config import Recipe
from training.corpus import Corpus, Tokens
from training.tokenizer import BEGIN_ID

Batch = tuple[NDArray[np.int64], NDArray[np.float32]]
KINDS = ("number", "number", "number", "code", "figure", "sum", "secret")
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
# The end of the line belongs to the answer: else nothing says where a value stops.
LINES = (
    ("{}:", " {}\n"),
    ('"{}": "', '{}",\n'),
    ("line {}: REGISTER_CONTENT is <", "{}>\n"),
    ("The value of {} is", " {}.\n"),
    ("{} =", " {}\n"),
)
Span = tuple[list[int], list[float]]
Item = TypeVar("Item")


class Mixture:
    """Builds batches of a recipe's curriculum from a corpus."""

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.corpus, self.recipe = corpus, recipe
        self.vocab = corpus.tokenizer.get_vocab_size()
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        self.use_phrasings(0)

    def use_phrasings(self, count: int, invented: float = 0.0) -> None:
        """Limit facts to the first ``count`` statements; 0 brings all of them and the questions.

        ``invented`` is the share of phrasings that are made up instead.
        """
        self.invented = invented
        self.statements = phrases.STATEMENTS[: count or None]
        self.asks = self.statements if count else phrases.QUESTIONS + phrases.STATEMENTS

    def _encode(self, text: str) -> list[int]:
        return self.corpus.tokenizer.encode(text, add_special_tokens=False).ids

    def batch(self, step: int, tokens_seen: int) -> Batch:
        """Tokens and weights [B, T + 1] of one step of the run."""
        rng = random.Random(f"{self.recipe.seed} {step}")
        stage = self.recipe.stage(tokens_seen)
        self.use_phrasings(stage.phrasings, stage.invented)
        length = draw(rng, stage.lengths)
        count = stage.batch_tokens // length
        rows = [self.sequence(rng, draw(rng, stage.mixture), length) for _ in range(count)]
        tokens, weights = zip(*rows, strict=True)
        return np.array(tokens, dtype=np.int64), np.array(weights, dtype=np.float32)

    def sequence(self, rng: random.Random, kind: str, length: int) -> Span:
        """One sequence of a kind, cut to ``length + 1``, beginning with the begin token."""
        tokens, weights = getattr(self, kind)(rng, length)
        return [BEGIN_ID, *tokens][: length + 1], [0.0, *weights][: length + 1]

    def excerpt(self, rng: random.Random, size: int) -> list[int]:
        """Consecutive tokens of natural text or code, from anywhere."""
        code = rng.random() < self.recipe.code_share
        source: Tokens = self.corpus.code if code else self.corpus.books
        start = rng.randrange(len(source) - size)
        return source[start : start + size].tolist()

    # --- the kinds, named in a recipe's mixture ---

    def text(self, rng: random.Random, length: int) -> Span:
        return self.excerpt(rng, length), [1.0] * length

    def repeat(self, rng: random.Random, length: int) -> Span:
        """Random tokens of a small alphabet, then the same again: only the repetition counts.

        The smaller the alphabet, the more tokens back must agree to tell one place from another.
        """
        size = rng.randint(length // 4, length // 2)
        alphabet = [rng.randrange(2, self.vocab) for _ in range(rng.choice((8, 16, 64, 256)))]
        span = rng.choices(alphabet, k=size)
        tokens = (span * (length // size + 1))[:length]
        return tokens, [0.0] * size + [1.0] * (length - size)

    def associate(self, rng: random.Random, length: int) -> Span:
        """Random keys with random values, all framed by the same random words; then keys again.

        The way from ``repeat`` to ``questions``: what precedes a value is alike everywhere, so that
        the key, a few tokens back, must be matched and not the last token.
        """
        out = Builder()
        known: list[tuple[list[int], list[int]]] = []
        limit = rng.randint(2, max(3, length // 20))
        before, between = self._random(rng, 0, 3), self._random(rng, 0, 3)
        digits = self.encode("0123456789")
        values = digits if rng.random() < 0.5 else self._random(rng, 32, 32)
        key_size, value_size = rng.randint(1, 3), rng.randint(1, 5)
        while len(out.tokens) < length:
            if fresh := len(known) < limit and rng.random() < max(0.4, 2 - len(known)):
                known.append(
                    (self._random(rng, key_size, key_size), rng.choices(values, k=value_size))
                )
            key, value = known[-1] if fresh else rng.choice(known)
            out.add([*before, *key, *between], 0.0)
            out.add(value, 0.0 if fresh else self.recipe.answer_weight)
        return out.tokens, out.weights

    def _random(self, rng: random.Random, least: int, most: int) -> list[int]:
        return [rng.randrange(2, self.vocab) for _ in range(rng.randint(least, most))]

    def copy(self, rng: random.Random, length: int) -> Span:
        """Natural text in which one passage comes again later."""
        tokens = self.excerpt(rng, length)
        size = rng.randint(12, max(13, length // 3))
        source = rng.randint(0, length - 2 * size)
        target = rng.randint(source + size, length - size)
        tokens[target : target + size] = tokens[source : source + size]
        return tokens, [1.0] * length

    def questions(self, rng: random.Random, length: int) -> Span:
        """Facts, questions about them and scraps of text, closely interleaved.

        Most of what counts is an answer: the densest signal for retrieval, meant for early on.
        Half of the sequences keep to one phrasing, which leaves nothing to tell facts apart by but
        name and thing.
        """
        out = Builder()
        only = rng.choice(self.statements) if rng.random() < 0.5 else None
        limit = rng.randint(2, max(3, min(24, length // 24)))
        known: list[tuple[Fact, str]] = []
        while len(out.tokens) < length:
            choice = rng.random()
            if not known or (choice < 0.35 and len(known) < limit):
                known.append(self._state(rng, out, only))
            elif choice < 0.88:
                self._ask(rng, out, *rng.choice(known), only)
            else:
                scrap = self.excerpt(rng, rng.randint(4, 30))
                out.add(scrap, 0.0)
        return out.tokens, out.weights

    def needle(self, rng: random.Random, length: int) -> Span:
        """A long text with facts anywhere in it; each is asked later, half of them at the end."""
        spacing = 64 * 8 ** rng.random()
        events: list[tuple[float, Builder]] = []
        for _ in range(max(1, min(40, round(length / spacing)))):
            statement, at = Builder(), rng.random()
            known = self._state(rng, statement)
            events.append((at, statement))
            for _ in range(rng.choice((1, 1, 2))):
                question = Builder()
                self._ask(rng, question, *known)
                at = 1.0 + rng.random() if rng.random() < 0.5 else rng.uniform(at, 1.0)
                events.append((at, question))
        room = max(8, length - sum(len(part.tokens) for _, part in events))
        return self._weave(self.excerpt(rng, room), events)

    def key_values(self, rng: random.Random, length: int) -> Span:
        """A list of keys and values, then keys from it whose values must be recalled."""
        line, answer = rng.choice(LINES)
        listed, out = 0.05 * 15 ** rng.random() * length, Builder()
        make_key, words = rng.choice((_word_key, _hex_key, _number_key)), rng.random() < 0.3
        table: dict[str, str] = {}
        if rng.random() < 0.5:
            out.add([*self.excerpt(rng, rng.randint(1, 12)), *self.encode("\n")], 0.0)
        while len(out.tokens) < listed or len(table) < 2:
            key = make_key(rng)
            if key not in table:
                table[key] = rng.choice(phrases.WORDS) if words else _digits(rng)
                out.add(self._encode(line.format(key)), 0.0)
                out.add(self._encode(answer.format(table[key])), 0.0)
        if rng.random() < 0.5:
            filler = self.excerpt(rng, int(rng.random() * 0.8 * max(1, length - len(out.tokens))))
            out.add(filler, 1.0)
            out.add(self.encode("\n"), 0.0)
        keys, blank = list(table), rng.random() < 0.3
        while len(out.tokens) < length:
            key = rng.choice(keys)
            if blank:
                out.add(self.encode("\n"), 0.0)
            out.add(self._encode(line.format(key)), 0.0)
            out.add(self._encode(answer.format(table[key])), self.recipe.answer_weight)
        return out.tokens, out.weights

    # --- facts ---

    def _state(self, rng: random.Random, out: Builder, only: str | None = None) -> tuple[Fact, str]:
        fact, phrasing = random_fact(rng), only or self._phrasing(rng, self.statements)
        out.add(self.encode("\n" + fact.prefix(phrasing)), 0.0)
        out.add(self.encode(f" {fact.value}"), 0.0)
        out.add(self.encode(".\n"), 0.0)
        return fact, phrasing

    def _ask(
        self, rng: random.Random, out: Builder, fact: Fact, stated: str, only: str | None = None
    ) -> None:
        """Ask as it was stated, or in any other way; the answer's tokens carry the weight."""
        phrasing = only or (stated if rng.random() < 0.35 else self._phrasing(rng, self.asks))
        out.add(self.encode("\n" + fact.prefix(phrasing)), 0.0)
        out.add(self.encode(f" {fact.value}"), self.recipe.answer_weight)
        out.add(self.encode(".\n"), 1.0)

    def _phrasing(self, rng: random.Random, known: Sequence[str]) -> str:
        """One of the known phrasings, or, at the stage's rate, one made up on the spot."""
        if self.invented and rng.random() < self.invented:
            return phrasings.invent(rng)
        return rng.choice(known)

    def _weave(self, filler: list[int], events: list[tuple[float, Builder]]) -> Span:
        """Insert events into text: below 1 at that fraction of it, from 1 on after its end."""
        out, last = Builder(), 0
        for at, part in sorted(events, key=lambda event: event[0]):
            cut = round(min(at, 1.0) * len(filler))
            out.add(filler[last:cut], 1.0)
            out.tokens += part.tokens
            out.weights += part.weights
            last = cut
        out.add(filler[last:], 1.0)
        return out.tokens, out.weights


class Builder:
    """Tokens and their weights, growing together."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.weights: list[float] = []

    def add(self, tokens: Sequence[int], weight: float) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)


def draw(rng: random.Random, weights: dict[Item, float]) -> Item:
    return rng.choices(list(weights), list(weights.values()))[0]


def random_fact(rng: random.Random) -> Fact:
    """Mostly the words of ``phrases``, some invented, so that no name can be learned by heart."""
    name = rng.choice(phrases.NAMES)
    if rng.random() < 0.3:
        name = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()
    thing = rng.choice(phrases.THINGS if rng.random() < 0.8 else phrases.WORDS)
    if rng.random() < 0.2:
        return Fact(name, thing, "word", rng.choice(phrases.WORDS))
    return Fact(name, thing, rng.choice(KINDS), _digits(rng))


def _digits(rng: random.Random) -> str:
    count = 5 if rng.random() < 0.7 else rng.randint(3, 8)
    return "".join(rng.choices("0123456789", k=count))


def _word_key(rng: random.Random) -> str:
    return f"{rng.choice(phrases.WORDS)}-{rng.choice(phrases.THINGS)}"


def _hex_key(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789abcdef", k=rng.randint(4, 8)))


def _number_key(rng: random.Random) -> str:
    return str(rng.randint(10, 99999))

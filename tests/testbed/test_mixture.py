from __future__ import annotations

import random

import numpy as np
import pytest
from training import phrasings
from training.batches import schedule
from training.config import Recipe
from training.corpus import Corpus
from training.mixture import Mixture
from training.tokenizer import BEGIN_ID

from kvloom.testbed import phrases

KINDS = ("text", "repeat", "associate", "copy", "questions", "needle", "key_values")
WEIGHT = 4.0


@pytest.fixture(scope="module")
def mixture(corpus: Corpus, recipe: Recipe) -> Mixture:
    return Mixture(corpus, recipe)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 256])
def test_every_kind_fills_the_length_and_begins_with_the_begin_token(
    mixture: Mixture, kind: str, length: int
) -> None:
    for seed in range(20):
        tokens, weights = mixture.sequence(random.Random(seed), kind, length)
        assert len(tokens) == len(weights) == length + 1
        assert tokens[0] == BEGIN_ID
        assert weights[0] == 0


@pytest.mark.parametrize("kind", ["associate", "questions", "needle", "key_values"])
def test_an_answer_counts_only_where_it_stands_earlier(mixture: Mixture, kind: str) -> None:
    found = 0
    for seed in range(10):
        tokens, weights = mixture.sequence(random.Random(seed), kind, 256)
        for start, end in answer_spans(weights):
            assert occurs(tokens[start:end], tokens[:start])
            found += 1
    assert found >= 10


def test_fresh_values_and_templates_do_not_count(mixture: Mixture, corpus: Corpus) -> None:
    tokens, weights = mixture.sequence(random.Random(3), "questions", 256)
    counted = [t for t, w in zip(tokens, weights, strict=True) if w == 1.0]
    assert set(corpus.tokenizer.decode(counted)) <= {".", "\n"}
    first_answer = weights.index(WEIGHT)
    assert not any(weights[: first_answer - 1])


def test_random_repetition_counts_from_the_second_time_on(mixture: Mixture) -> None:
    tokens, weights = mixture.repeat(random.Random(1), 200)
    size = weights.index(1.0)
    assert tokens[size:] == (tokens[:size] * 4)[: 200 - size]
    assert set(weights[size:]) == {1.0}


def test_batches_depend_on_seed_and_step_alone(corpus: Corpus, recipe: Recipe) -> None:
    one, other = Mixture(corpus, recipe), Mixture(corpus, recipe)
    one.batch(0, 0)
    mine, theirs = one.batch(3, 1536), other.batch(3, 1536)
    assert np.array_equal(mine[0], theirs[0]) and np.array_equal(mine[1], theirs[1])
    assert not np.array_equal(one.batch(3, 0)[0], one.batch(4, 0)[0])


def test_each_step_has_the_tokens_its_stage_plans(mixture: Mixture, recipe: Recipe) -> None:
    places = list(schedule(recipe, 0, 0))
    assert places == [(i, i * 512) for i in range(6)]
    assert list(schedule(recipe, 4, 2048)) == places[4:]
    for place in places:
        assert mixture.batch(*place)[0][:, 1:].size == 512


@pytest.mark.parametrize("invented", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["questions", "needle"])
def test_training_never_sees_the_unseen_phrasings(
    corpus: Corpus, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, kind: str, invented: float
) -> None:
    mixture, used = Mixture(corpus, recipe), set()
    mixture.use_phrasings(0, invented)
    prefix = phrases.Fact.prefix

    def noted(fact: phrases.Fact, phrasing: str) -> str:
        used.add(phrasing)
        return prefix(fact, phrasing)

    monkeypatch.setattr(phrases.Fact, "prefix", noted)
    for seed in range(40):
        mixture.sequence(random.Random(seed), kind, 256)
    unseen = phrases.UNSEEN_STATEMENTS + phrases.UNSEEN_QUESTIONS
    assert len(used & set(phrases.STATEMENTS)) > 10
    assert not used & set(unseen)
    openings = [phrasing.split("{")[0].strip() for phrasing in unseen]
    assert not any(phrasing.startswith(o) for phrasing in used for o in openings)


def test_a_stage_can_limit_the_ways_of_saying_a_fact(corpus: Corpus, recipe: Recipe) -> None:
    limited = Mixture(corpus, recipe)
    limited.use_phrasings(1)
    tokens, _ = limited.sequence(random.Random(2), "questions", 256)
    text = corpus.tokenizer.decode(tokens)
    assert text.count("\nThe ") > 5
    assert not any(p.split("{")[0] in text for p in phrases.QUESTIONS if not p.startswith("{"))


def test_a_stage_can_make_up_ways_of_saying_a_fact(corpus: Corpus, recipe: Recipe) -> None:
    made_up = Mixture(corpus, recipe)
    made_up.use_phrasings(0, invented=1.0)
    tokens, _ = made_up.sequence(random.Random(2), "needle", 256)
    text = corpus.tokenizer.decode(tokens)
    starts = {p.split("{")[0] for p in phrases.STATEMENTS + phrases.QUESTIONS}
    lines = [line for line in text.splitlines() if line.rstrip(".")[-1:].isdigit()]
    assert len(lines) >= 2
    assert not any(line.startswith(start) for line in lines for start in starts if start)


def test_made_up_phrasings_are_many_and_none_is_kept_for_the_test() -> None:
    made = {phrasings.invent(random.Random(seed)) for seed in range(3000)}
    assert len(made) > 2000
    assert all("{name}" in phrasing and "{thing}" in phrasing for phrasing in made)
    unseen = phrases.UNSEEN_STATEMENTS + phrases.UNSEEN_QUESTIONS
    openings = [phrasing.split("{")[0].strip() for phrasing in unseen]
    assert not any(opening in phrasing for phrasing in made for opening in openings)


def test_the_end_of_a_listed_value_counts(mixture: Mixture, corpus: Corpus) -> None:
    for seed in range(10):
        tokens, weights = mixture.sequence(random.Random(seed), "key_values", 900)
        spans = answer_spans(weights)
        assert spans and all(corpus.tokenizer.decode(tokens[a:b])[-1] == "\n" for a, b in spans)


def answer_spans(weights: list[float]) -> list[tuple[int, int]]:
    """Half-open runs of the answer weight; the last is dropped, it may be cut off."""
    edges = np.flatnonzero(np.diff([0, *(w == WEIGHT for w in weights), 0]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)][:-1]


def occurs(needle: list[int], haystack: list[int]) -> bool:
    n = len(needle)
    return any(haystack[i : i + n] == needle for i in range(len(haystack) - n + 1))

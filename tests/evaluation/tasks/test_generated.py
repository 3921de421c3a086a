"""Generated tasks: the same for a seed, as long as asked for, and solved by a regular expression."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from kvloom.evaluation import tasks
from kvloom.evaluation.tasks.base import Example
from kvloom.evaluation.tasks.ruler_words import _zeta

FILLER = "The wind went over the fields. Nobody heard it, and the 12 gates were shut. " * 900


def words(text: str) -> int:
    """A stand-in for a tokenizer."""
    return len(re.findall(r"\w+|\S", text))


def make(text: str, filler: str = FILLER) -> list[Example]:
    return tasks.parse(text).make(words, filler)


def of_key(e: Example) -> list[str]:
    (key,) = re.findall(r"[a-z]+-[a-z]+", e.question)
    return re.findall(rf"^{key}: (\w+)$", e.context, re.M)


def of_fact(e: Example) -> list[str]:
    """The only number of five digits."""
    return re.findall(r"\b\d{5}\b", e.context)


def of_needles(e: Example) -> list[str]:
    asked = e.question[e.question.rindex(" for ") :]
    keys = re.findall(r"[0-9a-f]{8}-[-0-9a-f]{27}|[a-z]+-[a-z]+", asked)
    said = [re.findall(rf" for {key} is: ([-\w]+)\.", e.context) for key in keys]
    return [value for values in said for value in values]


def of_chain(e: Example) -> list[str]:
    (value,) = set(re.findall(r"value (\d{5})", e.question))
    found = re.findall(rf"VAR (\w+) = {value}\b", e.context)
    for name in found:
        found += re.findall(rf"VAR (\w+) = VAR {name}\b", e.context)
    return found


def of_counts(pattern: str, count: int) -> Callable[[Example], list[str]]:
    def solve(e: Example) -> list[str]:
        counted = Counter(re.findall(pattern, e.context.partition("\n\n")[2])).most_common(
            count + 1
        )
        assert counted[count - 1][1] > counted[count][1]  # there is no tie
        return [word for word, _ in counted[:count]]

    return solve


SOLVED: dict[str, Callable[[Example], list[str]]] = {
    "needle(length=300, examples=4)": of_fact,
    "needle(length=300, depth=0.5, unseen=True, examples=2)": of_fact,
    "key_value(length=300, examples=4)": of_key,
    "key_value(length=300, depth=1.0, words=True, examples=2)": of_key,
    "niah_single(length=300)": of_needles,
    "niah_single(length=300, haystack='noise', value='word')": of_needles,
    "niah_single(length=300, value='uuid', key='uuid')": of_needles,
    "niah_multikey(length=300)": of_needles,
    "niah_multikey(length=500, haystack='needles')": of_needles,
    "niah_multikey(length=900, haystack='needles', value='uuid', key='uuid', keys=2)": of_needles,
    "niah_multivalue(length=300)": of_needles,
    "niah_multiquery(length=300)": of_needles,
    "variable_tracking(length=300)": of_chain,
    "variable_tracking(length=400, chains=3, hops=2, haystack='text')": of_chain,
    "common_words(length=900)": of_counts("[a-z]+", 10),
    "common_words(length=4100)": of_counts("[a-z]+", 10),
    "common_words(length=300, common=3, often=9, seldom=4)": of_counts("[a-z]+", 3),
    "frequent_words(length=900)": of_counts("[a-z]+", 3),
    "frequent_words(length=300, alpha=1.5)": of_counts("[a-z]+", 3),
}


@pytest.mark.parametrize("text", SOLVED)
def test_a_regular_expression_over_the_context_solves_it(text: str) -> None:
    task = tasks.parse(text)
    for e in make(text):
        found = SOLVED[text](e)
        assert sorted(found) == sorted(e.answers)
        assert task.score(e, " " + ", ".join(found) + ".") == 1.0
        assert task.score(e, " none of these") == 0.0
        assert not any(a in e.question for a in e.answers)


@pytest.mark.parametrize("text", SOLVED)
def test_a_seed_gives_the_same_and_another_gives_others(text: str) -> None:
    other = text.replace(")", ", seed=1)")
    assert make(text) == make(text) != make(other)
    assert len({e.context for e in make(text)}) == len(make(text))


@pytest.mark.parametrize("text", SOLVED)
def test_prompts_are_as_long_as_asked_for(text: str) -> None:
    length = tasks.parse(text).length  # type: ignore[attr-defined]
    for e in make(text):
        coarse = words(e.context.splitlines()[-1]) if "needles'" in text else 0  # of whole lines
        assert 0.9 * length - 30 - coarse < words(e.context) + words(e.question) <= length
        assert e.max_new_tokens > sum(words(a) for a in e.answers)


@pytest.mark.parametrize("text", ["needle", "key_value"])
def test_answers_stand_where_it_says(text: str) -> None:
    spread = make(f"{text}(length=500, examples=4)")
    for e, depth in zip(spread, [0.125, 0.375, 0.625, 0.875], strict=True):
        assert e.depth == pytest.approx(depth, abs=0.02)
        assert e.context.index(e.answers[0]) / len(e.context) == pytest.approx(depth, abs=0.1)
    (e,) = make(f"{text}(length=500, depth=0.25, examples=1)")
    assert e.depth == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("haystack", ["text", "noise", "needles"])
def test_a_single_needle_stands_where_it_says(haystack: str) -> None:
    for e in make(f"niah_single(length=900, haystack={haystack!r})"):
        at = e.context.index(e.answers[0]) / len(e.context)
        assert e.depth == pytest.approx(at, abs=0.15)


def test_a_register_has_as_many_pairs_as_asked_for() -> None:
    (e,) = make("key_value(pairs=20, examples=1)")
    assert e.context.count("\n") == 21
    whole = make("key_value(examples=1)")[0]
    assert 1950 < words(whole.context) + words(whole.question) <= 2048


def test_lines_end_where_their_names_do() -> None:
    (e,) = make("lines(length=90000, examples=1)")
    assert 3400 < e.context.count("REGISTER_CONTENT is") <= 3500
    assert words(e.context) + words(e.question) < 90000


def test_as_many_words_as_there_are_can_be_values() -> None:
    (e,) = make("niah_multivalue(length=3000, values=70, value='word', examples=1)")
    assert len(set(e.answers)) == 70


def test_only_needles_of_one_place_have_a_depth() -> None:
    assert all(e.depth is not None for e in make("niah_multikey(length=300)"))
    assert all(e.depth is None for e in make("niah_multiquery(length=300)"))


def test_several_answers_count_by_themselves() -> None:
    e = make("niah_multivalue(length=300)")[0]
    task = tasks.parse("niah_multivalue")
    assert task.score(e, f"{e.answers[2]} and {e.answers[0]}") == 0.5
    (named,) = make("variable_tracking(length=300, hops=1, examples=1)")
    assert tasks.parse("variable_tracking").score(named, named.answers[1].lower()) == 0.5


def test_needles_must_be_exact_and_come_first() -> None:
    e, task = make("needle(length=300)")[0], tasks.parse("needle")
    assert task.score(e, f" {e.answers[0]}.\nAnd") == 1
    assert task.score(e, f" is {e.answers[0]}") == task.score(e, f"{e.answers[0]}0") == 0


def test_frequencies_follow_the_zeta_distribution() -> None:
    assert _zeta(2.0) == pytest.approx(1.6449340668, abs=1e-8)  # pi^2 / 6
    assert _zeta(1.5) == pytest.approx(2.6123753487, abs=1e-6)
    (e,) = make("frequent_words(length=2000, examples=1)")
    counts = [n for _, n in Counter(e.context.split("\n\n")[1].split()).most_common(4)]
    n = counts[0] * 1.6449
    assert counts == pytest.approx([n / (k * k * 1.6449) for k in (1, 2, 3, 4)], abs=1.01)


@pytest.mark.parametrize(
    ("text", "filler", "rule"),
    [
        ("needle(length=2000)", "few words", "too short for needle tasks of 2000"),
        ("niah_single(length=2000)", "few words", "the text is too short"),
        ("common_words(length=100, often=30)", FILLER, "no room: the least takes"),
        ("frequent_words(length=64)", FILLER, "give more length"),
        ("niah_multikey(length=64, haystack='needles', keys=20)", FILLER, "no room"),
        ("variable_tracking(length=64, chains=9)", FILLER, "more than there is room for"),
        ("needle(length=64, facts=30)", FILLER, "the facts alone take"),
    ],
)
def test_what_has_no_room_is_refused(text: str, filler: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make(text, filler)

from __future__ import annotations

import pytest

from kvloom.testbed import phrases, tasks

FILLER = "The wind went over the fields and nobody heard it. " * 400


def test_the_same_seed_gives_the_same_task() -> None:
    first, again, other = (tasks.needle(seed, FILLER, 2000, facts=3) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("length", [400, 1000, 5000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_prompt_fills_the_length_and_the_fact_stands_at_its_depth(
    length: int, depth: float
) -> None:
    task = tasks.needle(1, FILLER, length, facts=1, depth=depth)
    assert length - 80 < len(task.prompt) <= length
    at = task.context.index(task.answer) / len(task.context)
    assert abs(at - depth) < 80 / length + 0.02


def test_every_fact_is_stated_once_and_the_answer_is_not_in_the_question() -> None:
    task = tasks.needle(3, FILLER, 3000, facts=4)
    assert task.context.count(task.answer) == 1
    assert task.answer not in task.question
    assert sum(word.strip(".").isdigit() for word in task.context.split()) == 4


def test_lengths_are_measured_by_the_callers_measure() -> None:
    task = tasks.needle(1, FILLER, 300, measure=lambda text: len(text.split()))
    assert 270 < len(task.prompt.split()) <= 300


def test_unseen_phrasings_share_nothing_with_the_seen_ones() -> None:
    seen = set(phrases.STATEMENTS + phrases.QUESTIONS)
    unseen = set(phrases.UNSEEN_STATEMENTS + phrases.UNSEEN_QUESTIONS)
    assert not seen & unseen
    assert all("{name}" in p and "{thing}" in p for p in seen | unseen)
    for seed in range(20):
        task = tasks.needle(seed, FILLER, 900, unseen=True)
        stated = next(line for line in task.context.splitlines() if task.answer in line)
        for said, phrasings in (
            (stated, phrases.UNSEEN_STATEMENTS),
            (task.question.strip(), phrases.UNSEEN_QUESTIONS),
        ):
            assert any(said.startswith(phrasing.split("{")[0]) for phrasing in phrasings)


def test_words_can_be_asked_instead_of_numbers() -> None:
    assert tasks.needle(4, FILLER, 900, words=True).answer in phrases.WORDS


@pytest.mark.parametrize(
    ("generated", "right"),
    [(" 12345.\nThe", True), ("12345", True), (" 123456", False), (" 1234", False), ("", False)],
)
def test_only_the_exact_answer_counts(generated: str, right: bool) -> None:
    assert tasks.Task("", "", "12345", 0.0, 1).correct(generated) is right


def test_key_value_lists_hold_the_asked_pair_at_its_depth() -> None:
    for depth, at in ((0.0, 1), (1.0, 20)):
        task = tasks.key_value(7, 20, depth=depth)
        key = task.question.strip()
        assert task.context.splitlines()[at] == f"{key} {task.answer}"
    assert len(set(line.split(":")[0] for line in task.context.splitlines())) == 21

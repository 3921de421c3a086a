from __future__ import annotations

import dataclasses

import pytest

from kvloom.evaluation import tasks
from kvloom.evaluation.tasks.base import Task
from kvloom.evaluation.tasks.needle import Needle

MADE = [cls() for cls in tasks.known().values() if all(
    f.default is not dataclasses.MISSING for f in dataclasses.fields(cls)
)]  # fmt: skip


@pytest.mark.parametrize("task", MADE, ids=lambda t: t.name)
def test_the_text_of_a_task_is_complete_and_means_the_same(task: Task) -> None:
    assert tasks.parse(str(task)) == task == tasks.parse(f" {task.name} ")
    for f in dataclasses.fields(task):
        assert f"{f.name}={getattr(task, f.name)!r}" in str(task)
    assert task.family and task.metric and type(task).__doc__


def test_parameters_are_literals_by_name() -> None:
    task = tasks.parse("needle(length=300, depth=0.25, words=True)")
    assert task == Needle(length=300, depth=0.25, words=True)
    assert str(task) == (
        "needle(length=300, depth=0.25, facts=1, unseen=False, words=True, examples=8, seed=0)"
    )
    assert tasks.parse("needle(depth=1)") == Needle(depth=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("needel", "unknown task 'needel'; did you mean 'needle'"),
        ("zzz", "known are "),
        ("needle(lenght=9)", "no parameter 'lenght'; did you mean 'length'"),
        ("needle(length=f())", "length must be a literal, not 'f\\(\\)'"),
        ("needle(99)", "write a name with parameters"),
        ("needle(**{})", "write a name with parameters"),
        ("needle | needle", "write a name with parameters"),
        ("", "task '': write"),
        ("needle(", "write a name with parameters"),
        ("needle(length=9)", "length must be at least 64, not 9"),
        ("needle(depth=2)", "depth must be between 0 and 1, not 2"),
        ("needle(depth=-.5)", "depth must be between 0 and 1"),
        ("needle(length='9')", "length must be int, not '9'"),
        ("needle(length=True)", "length must be int, not True"),
        ("needle(length=99.0)", "length must be int, not 99.0"),
        ("needle(words=1)", "words must be bool, not 1"),
        ("needle(depth='x')", "depth must be float or None, not 'x'"),
        ("niah_single(value='x')", "value must be one of 'number', 'word', 'uuid', not 'x'"),
        ("key_value(length=99, pairs=3)", "give length or pairs, not both"),
        ("key_value(pairs=99999)", "pairs must be at most 3500"),
        ("niah_multikey(keys=71, value='word')", "71 distinct values: there are 70 words"),
        ("niah_multivalue(values=71, value='word')", "71 distinct values: there are 70 words"),
        ("niah_multiquery(queries=3501)", "3501 distinct keys: there are 3500"),
        ("common_words(often=3, seldom=3)", "often \\(3\\) must be above seldom \\(3\\)"),
    ],
)
def test_a_wrong_text_is_restated_with_its_rule(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        tasks.parse(text)
    assert text in str(error.value)

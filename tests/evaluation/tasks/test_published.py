"""Tasks that are read from files as they were published, made small here."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kvloom.evaluation import tasks
from kvloom.evaluation.tasks import _records, scoring
from kvloom.evaluation.tasks._build import cut_middle
from kvloom.evaluation.tasks._longbench import KINDS
from kvloom.evaluation.tasks.base import Example
from kvloom.evaluation.tasks.gsm8k import SOLVED
from kvloom.evaluation.tasks.longbench import LongBench


def words(text: str) -> int:
    return len(re.findall(r"\w+|\S", text))


def write(path: Path, records: list[dict[str, Any]]) -> str:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def make(text: str) -> list[Example]:
    return tasks.parse(text).make(words, "")


def record(n: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "input": f"Who is {n}?", "context": f"passage {n} " * 20, "answers": [f"number {n}", "it"],
        "all_classes": None, "dataset": "hotpotqa", "length": 40, **fields,
    }  # fmt: skip


# -- LongBench -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_the_context_ends_where_the_question_begins(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"hotpotqa{suffix}", [record(0), record(1)])
    first, second = make(f"longbench(task='hotpotqa', path={path!r})")
    assert first.context.endswith("\n\n" + "passage 0 " * 20) and "Who is" not in first.context
    assert (
        first.question.startswith("\n\nBy the passages") and "Who is 0?\nAnswer:" in first.question
    )
    assert (first.answers, first.max_new_tokens, first.stop) == (("number 0", "it"), 32, None)
    assert "Who is 1?" in second.question
    folder = (
        make(f"longbench(task='hotpotqa', path={str(tmp_path)!r})") if suffix == ".jsonl" else None
    )
    assert folder is None or folder == [first, second]


def test_the_official_prompts_are_used_and_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [record(7)])
    prompts = tmp_path / "dataset2prompt.json"
    prompts.write_text(json.dumps({"hotpotqa": "Read {this}:\n{context}\nQ: {input}\nA:"}))
    own = tasks.parse(f"longbench(task='hotpotqa', path={path!r})")
    task = tasks.parse(f"longbench(task='hotpotqa', path={path!r}, prompts={str(prompts)!r})")
    (e,) = task.make(words, "")
    assert (e.context, e.question) == ("Read {this}:\n" + "passage 7 " * 20, "\nQ: Who is 7?\nA:")
    assert own.wording == "kvloom" and re.fullmatch(r"sha256:[0-9a-f]{64}", task.wording)
    before = task.wording
    prompts.write_text(json.dumps({"hotpotqa": "{context} {input}"}))
    assert task.wording != before


def test_prompts_that_are_written_out_are_taken_as_they_are(tmp_path: Path) -> None:
    def mini(task: str, n: int) -> dict[str, Any]:
        return {
            "task": task, "context_prompt": f"All {n}", "question_prompt": "\nWhat?", "answers": [n],
            "all_classes": ["A", "B"], "max_new_tokens": 999,
        }  # fmt: skip

    path = write(tmp_path / "mini.jsonl.xz", [mini("trec", 1), mini("lcc", 2), mini("trec", 3)])
    task = tasks.parse(f"longbench(task='trec', path={path!r})")
    made = task.make(words, "")
    assert [e.context for e in made] == ["All 1", "All 3"] and made[0].question == "\nWhat?"
    assert (made[0].answers, made[0].classes, made[0].max_new_tokens) == (("1",), ("A", "B"), 64)
    assert made[0].stop == "line" and task.wording.startswith("sha256:")
    with pytest.raises(ValueError, match="written out already"):
        make(f"longbench(task='trec', path={path!r}, prompts='x.json')")


@pytest.mark.parametrize("length", [40, 41, 64, 99])
def test_what_is_too_long_loses_its_middle(length: int) -> None:
    context, question = "".join(chr(65 + i) for i in range(900)), "question"
    cut, asked = cut_middle(context, question, length, len)
    assert (
        cut + asked
        == (context + question)[: length // 2] + (context + question)[length // 2 - length :]
    )
    assert asked == question
    assert cut_middle(context, question, 908, len) == (context, question)


def test_a_question_longer_than_half_loses_its_beginning() -> None:
    context, question = "abcdefghij", "".join(chr(65 + i) for i in range(90))
    for length in (10, 20):
        cut, asked = cut_middle(context, question, length, len)
        assert cut == context[: length // 2] and asked == question[-length // 2 :]


def test_parts_whose_tokens_grow_where_they_meet_still_fit() -> None:
    def pairs(text: str) -> int:  # as if "ab" alone were one token
        return len(text) - text.count("ab")

    for length in range(20, 40):
        cut, asked = cut_middle("ab" * 200, "?", length, pairs)
        assert pairs(cut) + pairs(asked) <= length


def test_prompts_are_cut_to_the_length(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [record(n, context="w " * 5000) for n in range(2)])
    for e in make(f"longbench(task='hotpotqa', path={path!r}, length=200)"):
        assert 190 < words(e.context) + words(e.question) < 200


def test_a_sample_is_drawn_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [record(n) for n in range(20)])
    text = f"longbench(task='hotpotqa', path={path!r}, examples=5"

    def drawn(rest: str) -> list[int]:
        return [int(e.answers[0].split()[1]) for e in make(text + rest)]

    first = drawn(")")
    assert first == drawn(", seed=0)") == sorted(first) and len(set(first)) == 5
    assert first != drawn(", seed=1)")
    assert len(make(text.replace("examples=5", "examples=99)"))) == 20


@pytest.mark.parametrize(
    ("fields", "text", "rule"),
    [
        ({}, "longbench(path='{path}')", "longbench needs task"),
        ({}, "longbench", "longbench needs task and path"),
        ({}, "longbench(task='hotpot', path='{path}')", "task must be one of 'narrativeqa'"),
        ({}, "longbench(task='lcc', path='{path}')", "has no record of this task"),
        ({"dataset": "trec"}, "longbench(task='trec', path='{path}')", "no 'all_classes'"),
        (
            {},
            "longbench(task='hotpotqa', path='{path}', prompts='none.json')",
            "prompts 'none.json'",
        ),
        (
            {},
            "longbench(task='hotpotqa', path='{path}', prompts='{path}')",
            "prompts .*JSONDecodeError",
        ),
        ({}, "longbench(task='hotpotqa', path='gone.jsonl')", "there is no such file"),
        ({}, "longbench(task='hotpotqa', path='{path}.txt')", "no local file or folder"),
    ],
)
def test_data_that_does_not_fit_is_named(
    tmp_path: Path, fields: dict[str, Any], text: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write(tmp_path / "d.jsonl", [record(**fields), record(**fields)])
    with pytest.raises(ValueError, match=rule):
        make(text.format(path=path))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "a line is not JSON"),
        ("", "every line must be an object"),
        ("[1]\n", "every line must be an object"),
        ('{"dataset": "hotpotqa"}', "a record has no 'input'"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rule):
        make(f"longbench(task='hotpotqa', path={str(path)!r})")
    (tmp_path / "d.jsonl.xz").write_bytes(b"no xz")
    with pytest.raises(ValueError, match="cannot be read"):
        _records.read(f"{path}.xz")


def test_the_hub_is_asked_for_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        if config == "lcc":
            raise RuntimeError("Dataset scripts are no longer supported\nat all")
        return [record(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (e,) = make("longbench(task='hotpotqa', path='THUDM/LongBench')")
    assert asked == [("THUDM/LongBench", "hotpotqa", "test")] and "Who is 3?" in e.question
    with pytest.raises(
        ValueError, match="RuntimeError: Dataset scripts are no longer supported\\)"
    ):
        make("longbench(task='lcc', path='THUDM/LongBench')")


# -- GSM8K ---------------------------------------------------------------------------------------


def test_problems_stand_behind_solved_ones(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl", [{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}]
    )
    (few,) = make(f"gsm8k(path={path!r}, shots=2)")
    assert few.context.count("\nProblem: ") == 2 and few.question == "\nProblem: 2+2?\nSolution:"
    assert (few.answers, few.stop, few.max_new_tokens) == (("1,004",), "line", 256)
    (none,) = make(f"gsm8k(path={path!r}, shots=0, new_tokens=9)")
    assert (none.context.count("Problem"), none.stop, none.max_new_tokens) == (0, None, 9)
    task = tasks.parse(f"gsm8k(path={path!r})")
    for said, few_score, none_score in (
        (" 2 + 2 = 4, and 1004.\n\nProblem: 7", 1, 0),
        ("\n The answer is $1,004.00", 1, 1),
        (" The answer is 1005", 0, 0),
        (" none", 0, 0),
    ):
        assert (task.score(few, said), task.score(none, said)) == (few_score, none_score)


def test_the_solved_problems_are_solved() -> None:
    for _, solution in SOLVED:
        steps = re.findall(r"(\d[\d.]*) ([-+*/]) (\d[\d.]*) = (\d+)", solution)
        assert steps and solution.count(" = ") == len(steps)
        for a, sign, b, result in steps:
            x, y = float(a), float(b)
            value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[sign]
            assert value == float(result), solution
        assert solution.endswith(f"The answer is {scoring.numbers(solution)[-1]:g}.")


def test_an_answer_without_a_number_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"question": "2+2?", "answer": "four"}])
    with pytest.raises(ValueError, match="does not end with '#### '"):
        make(f"gsm8k(path={path!r})")
    with pytest.raises(ValueError, match="shots must be between 0 and 8"):
        make(f"gsm8k(path={path!r}, shots=9)")


# -- lines and UUIDs -----------------------------------------------------------------------------


def of_lines(n: int, value: int = 42) -> dict[str, Any]:
    said = "".join(
        f"line key-{i}: REGISTER_CONTENT is <{value if i == 1 else i}>\n" for i in range(n)
    )
    prompt = f"Remember:\n\n{said}\nNow the record is over. Tell me what is in line key-1? "
    return {"num_lines": n, "random_idx": ["key-1", 1], "expected_number": value, "prompt": prompt}


def test_lines_of_a_file_keep_their_wording(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl.xz", [of_lines(3), of_lines(5), of_lines(500)])
    task = tasks.parse(f"lines(path={path!r}, length=400)")
    three, five = task.make(words, "")  # the longest is too long
    assert three.context.endswith("<2>\n") and three.question.startswith(
        "\nNow the record is over."
    )
    assert (three.answers, three.depth, five.depth) == (("42",), 0.5, 0.25)
    assert three.max_new_tokens >= 35 and task.wording.startswith("sha256:")
    assert make(f"lines(path={path!r}, length=400, lines=5)") == [five]
    assert len(make(f"lines(path={path!r}, length=400, examples=1)")) == 1
    for said, score in (("It is <42>.", 1), ("42, not 7", 1), ("7, not 42", 0), ("none", 0)):
        assert task.score(three, said) == score


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lines(path='{path}', length=64)", "at most 64 tokens; the shortest has"),
        ("lines(path='{path}', lines=7)", "no such prompt"),
        ("lines(lines=7)", "give a path, or length"),
        ("lines(path='{path}', depth=0.5)", "depth is of generated lines"),
    ],
)
def test_lines_that_do_not_fit_are_refused(tmp_path: Path, text: str, rule: str) -> None:
    path = write(tmp_path / "l.jsonl", [of_lines(30)])
    with pytest.raises(ValueError, match=rule):
        make(text.format(path=path))


def test_a_prompt_without_its_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", [of_lines(3) | {"prompt": "line key-1"}])
    with pytest.raises(ValueError, match=r"lacks .*Now the record is over"):
        make(f"lines(path={path!r})")


def test_objects_of_a_file_are_asked_for_their_key(tmp_path: Path) -> None:
    pairs = [[f"key{i}", f"value{i}"] for i in range(5)]
    found = {"ordered_kv_records": pairs, "key": "key1", "value": "value1"}
    path = write(tmp_path / "kv.jsonl.gz", [found])
    (e,) = make(f"uuid_key_value(path={path!r})")
    assert json.loads(e.context.partition("\n\n")[2]) == dict(pairs)
    assert '"key1"' in e.question and (e.answers, e.depth) == (("value1",), 0.25)
    (last,) = make(f"uuid_key_value(path={path!r}, depth=1.0)")
    assert last.depth == 1 and list(json.loads(last.context.partition("\n\n")[2]))[-1] == "key1"
    with pytest.raises(ValueError, match="no object has at most 64 tokens"):
        make(
            f"uuid_key_value(path={write(tmp_path / 'w.jsonl', [found | {'ordered_kv_records': pairs * 9}])!r}, length=64)"
        )
    with pytest.raises(ValueError, match="lacks the pair"):
        make(f"uuid_key_value(path={write(tmp_path / 'x.jsonl', [found | {'key': 'key2'}])!r})")


# -- the files themselves, where a machine has them ----------------------------------------------

DATA = Path(os.environ.get("KVLOOM_DATA", "data"))
here = pytest.mark.skipif(
    not (DATA / "minilongbench_en.jsonl.xz").exists(), reason="set KVLOOM_DATA to a folder with it"
)


@here
@pytest.mark.parametrize("name", KINDS)
def test_every_english_task_of_minilongbench_is_read(name: str) -> None:
    path = str(DATA / "minilongbench_en.jsonl.xz")
    task = LongBench(task=name, path=path, length=1000)
    made = task.make(words, "")
    official = {r["max_new_tokens"] for r in _records.read(path) if r["task"] == name}
    assert official == {e.max_new_tokens for e in made}
    assert all(words(e.context) + words(e.question) < 1000 for e in made)
    assert all(task.score(e, e.answers[0]) == pytest.approx(1, abs=1e-6) for e in made)

"""Scores against values worked out by hand; the arithmetic stands beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.evaluation import tasks
from kvloom.evaluation.tasks import scoring
from kvloom.evaluation.tasks._longbench import KINDS, PROMPTS

# what the model wrote, the accepted answers, the score, and further fields of the record.
# QA F1: words after normalization (lower case, no punctuation, no a/an/the); 2 * common / (said + answer)
HAND: dict[str, list[tuple[str, list[str], float]]] = {
    # said {arthurs, magazine}, answer {arthurs, magazine}: 2*2/(2+2)
    "hotpotqa": [
        (" Arthur's  Magazine.", ["The Arthur's magazine"], 1.0),
        # said {it, was, arthurs, magazine}: 2*2/(4+2)
        (" It was Arthur's Magazine", ["Arthur's Magazine"], 4 / 6),
    ],
    # said {yes, yes}, answer {yes}: one in common as multisets, 2*1/(2+1)
    "2wikimqa": [(" Yes, yes", ["yes"], 2 / 3), (" no", ["yes"], 0.0)],
    # the best over the answers: {ut} 2*1/(1+1) beats {university, of, toronto} 0
    "musique": [(" UT", ["University of Toronto", "UT"], 1.0)],
    # said {no, it, is, not, necessary, indeed}, answer {no, it, is, not, necessary}: 2*5/(6+5)
    "multifieldqa_en": [("No, it is not necessary, indeed!", ["No, it is not necessary."], 10 / 11)],
    # said {she, declined, to, read, letter}, answer {she, declined, to, read, it}: 2*4/(5+5)
    "narrativeqa": [(" She declined to read the letter", ["She declined to read it."], 8 / 10)],
    # said {005, f1}: "0.05" loses its point; answer the same: 1. Later lines count here: 2*2/(4+2)
    "qasper": [(" 0.05 F1", ["5 percent points.", "0.05 F1"], 1.0), ("0.05 F1\nand more", ["0.05 F1"], 4 / 6)],
    # ROUGE-L: sentences end at "."; distinct words of the longest common subsequences.
    # said "the navy lost two ships", answer "the navy has lost ships": common {the, navy, lost, ships},
    # precision 4/5, recall 4/5
    "gov_report": [("the navy lost two ships.", ["the navy has lost ships."], 0.8)],
    # "Hello" and "hello" differ: common {all}; precision 1/2, recall 1/2
    "qmsum": [("Hello all", ["hello all"], 0.5), ("", ["hello all"], 0.0)],
    # two sentences said, one in the answer "a b c d": common with "a b": {a, b}, with "d c": one of {c}, {d}.
    # Union 3 of 4 distinct said and 4 of the answer: 3/4. (The blank after "." is stripped.)
    "multi_news": [("a b. d c.", ["a b c d"], 0.75),
    # a repeated word counts once: said {a}, answer {a, b}: precision 1, recall 1/2: 2*.5/1.5
    ("a a a", ["a b"], 2 / 3)],
    # only the first line counts. The class is named alone: 1
    "trec": [("\n Date\nType: City", ["Date"], 1.0),
    # two classes are named, one of them right: 1/2
    (" Date or City", ["Date"], 0.5),
    # "Number" is part of the answer's name and does not count; then "Number of something" alone: 1
    (" Number of something", ["Number of something"], 1.0), (" Mountain", ["Date"], 0.0)],
    # first line {map, pin}: 2*2/(2+2); a second line would have made it 4/6
    "triviaqa": [("\nMap pin\nPassage: more", ["Map pin"], 1.0)],
    # first line "Emilia is still angry"; the answer's full stop ends its sentence, so 4 words of 4 and 4
    "samsum": [(" Emilia is still angry\nDialogue: x", ["Emilia is still angry."], 1.0)],
    # numbers said: 17, 4, 17; two of three
    "passage_count": [("17 (not 4), 17", ["17"], 2 / 3), ("none", ["17"], 0.0)],
    # numbers said: 19, 3; one of two
    "passage_retrieval_en": [(" Paragraph 19 or 3", ["Paragraph 19"], 0.5)],
    # first line that is code is "x = 1"; answer "x = 2": LCS "x = " 4, 2*4/(5+5) = .8
    "lcc": [("# set it\nx = 1\ny", ["x = 2"], 0.8),
    # LCS of "return a" (8) and "return abc" (10) is 8: 16/18 = .888..., in whole per cent
    ("return a", ["return abc"], 0.89)],
    # "//", "`": no code; then an empty line, which has nothing in common
    "repobench-p": [("// a\n`b`\n    int i;", ["    int i;"], 1.0), ("// a\n\nint i;", ["int i;"], 0.0)],
}  # fmt: skip
CLASSES = ["Number", "Date", "City", "Number of something", "Mountain"]


@pytest.mark.parametrize("name", KINDS)
def test_longbench_scores_are_those_worked_out_by_hand(name: str, tmp_path: Path) -> None:
    records = [
        {"input": "q", "context": "c", "answers": answers, "all_classes": CLASSES, "dataset": name}
        for _, answers, _ in HAND[name]
    ]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    task = tasks.parse(f"longbench(task={name!r}, path={str(path)!r})")
    for example, (said, _, score) in zip(task.make(len, ""), HAND[name], strict=True):
        assert task.score(example, said) == pytest.approx(score, abs=1e-7)


def test_every_task_has_its_length_and_metric() -> None:
    assert {n: (k.new_tokens, k.metric) for n, k in KINDS.items()} == {
        "hotpotqa": (32, "qa_f1"), "2wikimqa": (32, "qa_f1"), "musique": (32, "qa_f1"),
        "multifieldqa_en": (64, "qa_f1"), "narrativeqa": (128, "qa_f1"), "qasper": (128, "qa_f1"),
        "gov_report": (512, "rouge_l"), "qmsum": (512, "rouge_l"), "multi_news": (512, "rouge_l"),
        "triviaqa": (32, "qa_f1"), "samsum": (128, "rouge_l"), "trec": (64, "classification"),
        "passage_retrieval_en": (32, "retrieval"), "passage_count": (32, "count"),
        "lcc": (64, "code_similarity"), "repobench-p": (64, "code_similarity"),
    }  # fmt: skip
    assert {n for n, k in KINDS.items() if k.first_line} == {"trec", "triviaqa", "samsum"}
    assert set(PROMPTS) == set(KINDS) and all(p.count("{context}") == 1 for p in PROMPTS.values())


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat,\nan apple & A-B.", "cat apple ab"),
        ("a.b the", "ab"),
        ("Theatre", "theatre"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("", ""),
    ],
)
def test_normalization(text: str, plain: str) -> None:
    assert scoring.normalize(text) == plain


def test_of_equal_subsequences_the_one_that_rouge_finds_counts() -> None:
    # of "a b" and "b a" both {a} and {b} are longest; from the ends, "b" is met first
    assert scoring._common(["a", "b"], ["b", "a"]) == ["b"]
    # so with a further sentence "b" the union is {b}: 1 of 2 words said, 1 of 2 in the answer
    assert scoring.rouge_l("b a.b", "a b") == pytest.approx(0.5)


def test_the_class_behind_one_left_out_is_never_looked_at() -> None:
    # named in order: A, A b, A b c. "A" is part of the answer and goes; "A b" takes its place unseen, so
    # it stays beside the answer: 1/2
    assert scoring.classification("A b c", "A b c", ["A", "A b", "A b c"]) == 0.5
    assert scoring.classification("A b c", "A b c", ["A", "x", "A b c"]) == 1.0


@pytest.mark.parametrize(
    ("said", "found"),
    [("It is 1,250.50, or -3", [1250.5, -3]), ("$5.", [5]), ("x", []), ("16-3-4=9", [16, 3, 4, 9]), (".5", [0.5])],
)  # fmt: skip
def test_numbers_are_read(said: str, found: list[float]) -> None:
    assert scoring.numbers(said) == found


def test_what_ruler_counts_occurs_in_any_case() -> None:
    assert scoring.contained("ABC and 123", ["abc", "12", "x", "y"]) == 0.5

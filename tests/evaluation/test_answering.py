from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvloom import CompressedCache, testbed
from kvloom.core.budget import Budget
from kvloom.evaluation import answering, equal, identity
from kvloom.evaluation.answering import Prepared, greedy, prepare
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.subjects import Cell, cells_of, parse
from kvloom.evaluation.task_bench import TaskBench, prepare_task
from kvloom.evaluation.task_results import TaskRow
from kvloom.evaluation.tasks import Example, Task
from kvloom.evaluation.tasks import parse as task_of
from kvloom.hf import load
from tests.evaluation.tiny import ByteTokenizer, perturbed
from tests.models import build

FILLER = "many words of filler " * 200


@dataclasses.dataclass(frozen=True)
class Fixed(Task):
    """Examples as given, of which `wanted` is the answer."""

    family = "fixed"
    metric = "exact"
    wanted: str = "x"
    stop: str = ""
    new: int = 6

    def make(self, measure: Any, filler: str) -> list[Example]:
        stop: Any = self.stop or None
        return [
            Example(
                f"A context number {i}, and more of it." * 3,
                "? It is",
                (self.wanted,),
                self.new,
                stop=stop,
            )
            for i in range(3)
        ]

    def score(self, example: Example, generated: str) -> float:
        return float(generated.startswith(example.answers[0]))


def prepared(view: str = "blind", **fields: Any) -> Prepared:
    return prepare(Fixed(**fields), ByteTokenizer(), view, "")


def measured(task: Prepared, recipe: str = "none", budget: str | None = None, chunk: int = 0, model: Any = None):  # fmt: skip
    amount = None if budget is None else Budget.parse(budget)
    seen: list[int] = []
    found = answering.measure(
        model or build("llama"), ByteTokenizer(), parse(recipe), amount, task, chunk, seen.append
    )
    assert sum(seen) == sum(a.tokens for a in task.asked)
    return found


# -- what is asked -------------------------------------------------------------------------------


def test_what_is_asked_is_hashed_with_what_counts() -> None:
    task = Fixed()
    hashes = [
        prepare(t, ByteTokenizer(), "blind", "").sha256
        for t in (task, Fixed(wanted="y"), Fixed(stop="line"), Fixed(new=7))
    ]
    assert len(set(hashes)) == 4
    assert hashes[0] == prepare(task, ByteTokenizer(), "sighted", "").sha256
    assert prepared().tokens == prepared().asked[0].tokens == len(prepared().asked[0].context) + 7


@pytest.mark.parametrize(
    ("task", "view", "rule"),
    [("needle(length=200)", "seen", "view 'seen': one of blind, sighted")],
)
def test_a_wrong_task_is_named(task: str, view: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        prepare(task_of(task), ByteTokenizer(), view, FILLER)


def test_an_example_needs_a_context_and_a_question() -> None:
    for context, question in (("", "q"), ("c", "")):
        with pytest.raises(ValueError, match="one of them is empty"):
            answering.ask(Example(context, question, ("a",), 3), ByteTokenizer())


# -- greedy --------------------------------------------------------------------------------------


class Script:
    """A decoder whose tokens are given."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.fed = tokens, list[int]()

    def logits(self) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.tokens[len(self.fed)]), 97)[
            None
        ].float()

    def feed(self, ids: torch.Tensor, keep: int = 1) -> torch.Tensor:
        self.fed += ids.tolist()
        return self.logits()


def test_greedy_ends_at_an_end_the_limit_or_a_stop() -> None:
    for limit, ends, stop, expected in (
        (4, frozenset(), None, [5, 6, 7, 8]),
        (9, frozenset({7, 50}), None, [5, 6]),
        (9, frozenset({5}), None, []),
        (9, frozenset(), lambda ids: ids[-1] == 6, [5, 6]),
    ):
        decoder: Any = Script([5, 6, 7, 8, 9])
        assert greedy(decoder, decoder.logits(), limit, ends, stop) == expected
        assert decoder.fed == expected[: len(decoder.fed)]  # the last is never fed in vain


def test_ends_are_the_models_and_the_tokenizers() -> None:
    class Holder:
        def __init__(self, ids: Any):
            self.eos_token_id = ids

    class Model:
        generation_config = Holder([3, 4])

    assert answering.end_tokens(Model(), Holder(9)) == {3, 4, 9}
    assert answering.end_tokens(object(), ByteTokenizer()) == frozenset()


def test_a_line_ends_with_its_newline_not_with_those_before_it() -> None:
    class Lines(ByteTokenizer):
        def decode(self, ids: list[int]) -> str:
            return "".join({5: "\n", 6: "x"}[i] for i in ids)

    decoder: Any = Script([5, 5, 6, 6, 5, 6, 6])
    example = Example("c", "q", ("a",), 7, stop="line")
    assert answering.answer(None, Lines(), decoder, decoder.logits(), example) == "\n\nxx\n"


# -- through the cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["blind", "sighted"])
@pytest.mark.parametrize("chunk", [0, 16])
def test_answers_equal_a_loop_by_hand(view: str, chunk: int) -> None:
    model, task = build("llama"), prepared(view)
    held, counts, answers = measured(task, "h2o", "40tok", chunk, model)
    dense = []
    for asked, answer in zip(task.asked, answers, strict=True):
        cache = CompressedCache(model, "h2o", "40tok")
        first, rest = asked.context, asked.question
        if view == "sighted":
            first, rest = torch.cat([first, rest[:-1]]), rest[-1:]
        for part in first.split(chunk or len(first)):
            logits = model(part[None], past_key_values=cache).logits
        before = cache.stats().dense_nbytes
        logits = model(rest[None], past_key_values=cache).logits
        dense.append(before if view == "blind" else cache.stats().dense_nbytes)
        ids = []
        for _ in range(6):
            ids.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits
        assert answer.generated == ByteTokenizer().decode(ids)
        assert (answer.expected, answer.tokens, answer.depth) == (["x"], asked.tokens, None)
    assert held.dense_mean == sum(dense) / 3 and held.allowed is None
    assert counts.evicted > 0 and counts.compressions > 0


def test_bytes_are_noted_when_the_context_is_in() -> None:
    blind, _, _ = measured(prepared("blind"))
    sighted, _, _ = measured(prepared("sighted"))
    task, model = prepared(), build("llama")
    cache = CompressedCache(model, "none")
    model(task.asked[0].context[None], past_key_values=cache)
    assert blind.dense_mean == cache.stats().dense_nbytes
    assert sighted.dense_mean / blind.dense_mean == pytest.approx(
        task.tokens / len(task.asked[0].context)
    )
    assert blind.mean <= sighted.mean <= blind.peak and blind.other_mean == 0
    share, _, _ = measured(prepared(), "h2o", "60%")
    assert share.allowed == pytest.approx(0.6 * blind.dense_mean) and share.floor > 0
    gemma, _, _ = measured(prepared(), model=build("gemma2"))
    assert 0 < gemma.other_mean < gemma.mean


def test_the_question_in_view_changes_what_is_kept() -> None:
    found = [
        [a.generated for a in measured(prepared(view), "snapkv(window=8)", "20tok")[2]]
        for view in ("blind", "sighted")
    ]
    assert found[0] != found[1]


def test_scores_are_the_tasks() -> None:
    (first, *_) = measured(prepared())[2]
    assert first.score == 0
    (again, *_) = measured(prepared(wanted=first.generated[:3]))[2]
    assert again.score == 1 and again.generated == first.generated


def test_recomputing_a_window_answers_without_a_cache() -> None:
    held, counts, answers = measured(prepared(), "recompute(window=400)")
    assert (held.mean, held.dense_mean, counts.evicted) == (0, 0, 0) and held.ratio is None
    full = measured(prepared())[2]
    assert [a.generated for a in answers] == [a.generated for a in full]  # all within the window


# -- cells and rows ------------------------------------------------------------------------------


def bench(
    model: Any = None, task: str = "needle(length=200, examples=2)", **given: Any
) -> TaskBench:
    model = model or build("llama")
    made = prepare(task_of(task), ByteTokenizer(), given.pop("view", "blind"), FILLER)
    facts = identity.model_facts(model, given.pop("name", "tiny"))
    return TaskBench(model, ByteTokenizer(), facts, made, "words", given.pop("chunk", 0))


CELL = cells_of(["h2o @ 40tok"])[1]


def test_the_key_changes_with_everything_that_determines_a_cell() -> None:
    keys = [
        bench().key(CELL),
        bench().key(cells_of(["h2o @ 41tok"])[1]),
        bench().key(cells_of(["knorm @ 40tok"])[1]),
        bench(perturbed()).key(CELL),
        bench(build("llama", dtype=torch.bfloat16)).key(CELL),
        bench(task="needle(length=210, examples=2)").key(CELL),
        bench(task="needle(length=200, examples=2, seed=1)").key(CELL),
        bench(view="sighted").key(CELL),
        bench(chunk=16).key(CELL),
    ]
    for name in ("source_sha256", "torch", "transformers", "cpu", "threads", "backend"):
        other = bench()
        other.environment = dataclasses.replace(other.environment, **{name: "other"})
        keys.append(other.key(CELL))
    assert len(set(keys)) == len(keys)
    assert bench(name="the same weights elsewhere").key(CELL) == keys[0]


def test_a_row_says_what_it_is_and_survives_its_line() -> None:
    made, left = bench(), [0]

    class Log(Progress):
        def advance(self, steps: int) -> None:
            left[0] += steps

    made.check([CELL])
    row = made.measure(CELL, Log())
    assert left[0] == made.steps
    assert row.key == made.key(CELL) and TaskRow.from_json(row.to_json()) == row
    assert row.task.task == str(made.prepared.task) and row.task.sha256 == made.prepared.sha256
    assert (row.task.family, row.task.metric, row.task.view) == ("needle", "exact", "blind")
    assert (row.task.examples, len(row.answers), row.task.prompts) == (2, 2, "kvloom")
    assert row.subject.recipe == "h2o" and row.subject.budget == "40tok"
    assert row.bytes.ratio and row.bytes.ratio > 1 and row.counts.evicted > 0
    assert [a.depth for a in row.answers] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("recipe", "word"),
    [("h2o", "none was given"), ("int4 @ 25%", "nothing in the recipe evicts"), ("h2o @ 10B", "below the floor")],
)  # fmt: skip
def test_a_cell_that_cannot_be_measured_is_refused_before_any_work(recipe: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        bench().check(cells_of([recipe]))


def test_task_rows_are_compared_at_equal_bytes() -> None:
    made = bench()
    cells = cells_of(["h2o", "knorm", "h2o | int4"], ["30%"])
    rows = [made.measure(cell, Progress()) for cell in cells[1:]]
    h2o, knorm, _ = rows
    equal.require_equal([h2o, knorm])
    use = equal.budget_use(h2o)
    assert use is not None and 0.5 < use <= 1.02 and not equal.idle(h2o)
    assert "30%: equal bytes" in equal.remarks([h2o, knorm])[0]
    less = dataclasses.replace(
        knorm, bytes=dataclasses.replace(knorm.bytes, mean=knorm.bytes.mean / 2)
    )
    assert equal.unequal([h2o, less]) == {"knorm": pytest.approx(0.5, abs=0.02)}
    with pytest.raises(ValueError, match="NOT equal bytes"):
        equal.require_equal([h2o, less])


# -- the testbed model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    load.quiet()
    return load.pretrained(testbed.path(), torch.float32)


@pytest.mark.parametrize(
    "task", ["needle(length=300, examples=4)", "key_value(length=200, examples=4)"]
)
def test_the_testbed_answers_unless_what_it_needs_is_evicted(
    trained: tuple[Any, Any], task: str
) -> None:
    made = prepare_task(*trained, "testbed", task)
    none, window, budget = (
        made.measure(Cell(parse(r), b), Progress())
        for r, b in (
            ("none", None),
            ("streaming_llm(recent=24)", None),
            ("h2o", Budget.parse("10%")),
        )
    )
    assert none.score >= 0.75 and window.score == budget.score == 0
    assert none.task.tokens <= none.answers[0].tokens + 60


def test_the_filler_is_a_text_by_name(trained: tuple[Any, Any], tmp_path: Any) -> None:
    path = tmp_path / "plain.txt"
    path.write_text("Nothing happened here. " * 400)
    made = prepare_task(
        *trained, "testbed", "needle(length=200, examples=1)", "sighted", 64, str(path)
    )
    assert "Nothing happened" in made.prepared.asked[0].example.context
    assert (made.facts.view, made.facts.prefill_chunk, made.text) == ("sighted", 64, str(path))
    with pytest.raises(ValueError, match="no-such"):
        prepare_task(*trained, "testbed", "needle", filler_text_name="no-such.txt")
    # a task without filler reads none
    assert prepare_task(
        *trained, "testbed", "key_value(length=200)", filler_text_name="no-such.txt"
    )

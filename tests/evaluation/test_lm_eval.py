from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvloom import CompressedCache
from kvloom.evaluation import compare
from kvloom.evaluation.lm_eval import Scorer, register, windows
from tests.evaluation.tiny import ByteTokenizer
from tests.models import build


class Tokenizer(ByteTokenizer):
    """Bytes, begun by a token of its own where special ones are asked for."""

    bos_token_id = 1

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids] if options["add_special_tokens"] else ids}


def scorer(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Scorer:
    monkeypatch.setattr(compare, "load_model", lambda *_: (build("llama"), Tokenizer()))
    return Scorer(pretrained="tiny", **arguments)


def asked(*arguments: Any) -> list[Any]:
    """Requests as the harness hands them over."""
    return [SimpleNamespace(args=a) for a in arguments]


def by_hand(
    recipe: str, budget: str | None, context: list[int], rest: list[int], chunk: int = 0
) -> tuple[float, bool]:
    """The same by a plain loop."""
    model = build("llama")
    cache = CompressedCache(model, recipe, budget)
    prompt = torch.tensor(context[:-1])
    for part in prompt.split(chunk or max(1, len(prompt))) if len(prompt) else []:
        model(part[None], past_key_values=cache)
    total, greedy, last = 0.0, True, context[-1]
    for token in rest:
        logits = model(torch.tensor([[last]]), past_key_values=cache).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
        last = token
    return total, greedy


def ids(text: str) -> list[int]:
    return ByteTokenizer()(text)["input_ids"]


CONTEXT = "Some words that stand before what is scored, enough of them to be evicted."


@pytest.mark.parametrize(("recipe", "budget"), [("none", None), ("h2o", "40tok"), ("int4", None)])
@pytest.mark.parametrize("chunk", [0, 16])
def test_loglikelihoods_equal_a_loop_by_hand(
    monkeypatch: pytest.MonkeyPatch, recipe: str, budget: str | None, chunk: int
) -> None:
    made = scorer(monkeypatch, recipe=recipe, budget=budget, prefill_chunk=chunk)
    requests = asked(
        (CONTEXT, " one"), ("Other words", " x"), (CONTEXT, " another one"), (CONTEXT, "")
    )
    for (context, rest), found in zip(
        [r.args for r in requests], made.loglikelihood(requests), strict=True
    ):
        total, greedy = by_hand(recipe, budget, [1, *ids(context)], ids(rest), chunk)
        assert found == (pytest.approx(total, rel=1e-4, abs=1e-6), greedy)


def test_a_full_cache_equals_one_plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [1, *ids(CONTEXT + " one")]
    logp = build("llama")(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
    expected = sum(float(logp[i - 1, whole[i]]) for i in range(len(whole) - 4, len(whole)))
    ((total, _),) = scorer(monkeypatch).loglikelihood(asked((CONTEXT, " one")))
    assert total == pytest.approx(expected, rel=1e-4)
    (all_of_it,) = scorer(monkeypatch).loglikelihood_rolling(asked((CONTEXT + " one",)))
    expected = sum(float(logp[i - 1, whole[i]]) for i in range(1, len(whole)))
    assert all_of_it == pytest.approx(expected, rel=1e-4)


def test_what_a_greedy_model_writes_is_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(monkeypatch, recipe="h2o", budget="40tok")
    (text,) = made.generate_until(asked((CONTEXT, {"max_gen_toks": 5, "until": []})))
    assert len(text) == 5
    model = build("llama")
    cache = CompressedCache(model, "h2o", "40tok")
    prompt = [1, *ids(CONTEXT)]
    model(torch.tensor([prompt[:-1]]), past_key_values=cache)
    written, last = [], prompt[-1]
    for _ in range(5):
        last = int(model(torch.tensor([[last]]), past_key_values=cache).logits[0, -1].argmax())
        written.append(last)
    assert text == Tokenizer().decode(written)
    assert by_hand("h2o", "40tok", prompt, written)[1]


def test_generation_ends_before_the_first_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(monkeypatch)
    (whole,) = made.generate_until(asked((CONTEXT, {"max_gen_toks": 20})))
    for until in (whole[7:9], [whole[12:14], whole[7:9]]):
        (cut,) = made.generate_until(asked((CONTEXT, {"max_gen_toks": 20, "until": until})))
        assert cut == whole[: whole.index(whole[7:9])]
    (short,) = made.generate_until(asked((CONTEXT, {"max_tokens": 3, "temperature": 0.7})))
    assert short == whole[:3]
    with pytest.raises(ValueError, match="greedily only"):
        made.generate_until(asked((CONTEXT, {"do_sample": True})))


def test_spaces_before_a_continuation_belong_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(monkeypatch)
    assert made._encode_pair("a b ", "c") == ([1, *ids("a b")], ids(" c"))
    assert made._encode_pair("", "c d") == ([1], ids("c d"))
    assert made._encode_pair("  ", "c") == ([1], ids("  c"))
    first, second = made.loglikelihood(asked((CONTEXT + " ", "x"), (CONTEXT, " x")))
    assert first == second


def test_what_is_too_long_loses_its_oldest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(monkeypatch, max_length=10)
    context, rest = made._encode_pair("abcdefghijklmno", "xyz")
    assert (context, rest) == (ids("hijklmno"), ids("xyz"))  # the last token is never fed
    assert len(made._encode_pair("a", "x" * 10)[0]) == 1
    with pytest.raises(ValueError, match="a continuation of 11 tokens"):
        made._encode_pair("a", "x" * 11)
    with pytest.raises(ValueError, match="10 new tokens: the model takes 10"):
        made.generate_until(asked(("a", {"max_gen_toks": 10})))
    assert scorer(monkeypatch).max_length == 8192  # what the model was made for


@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 11, 13])
def test_windows_predict_each_token_once(n: int) -> None:
    text, length = list(range(10, 10 + n)), 4
    found = windows(text, 1, length)
    assert [t for _, rest in found for t in rest] == text
    for i, (context, rest) in enumerate(found):
        assert context and len(context) + len(rest) - 1 <= length
        at = text.index(rest[0])
        assert context == ([1] if i == 0 else text[at - len(context) : at])
    if n > length:
        assert len(found[-1][0]) + len(found[-1][1]) - 1 == length  # it looks back as far as it can


def test_rolling_sums_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(monkeypatch, recipe="int4", max_length=30)
    (total,) = made.loglikelihood_rolling(asked((CONTEXT,)))
    expected = sum(by_hand("int4", None, c, r)[0] for c, r in windows(ids(CONTEXT), 1, 30))
    assert total == pytest.approx(expected, rel=1e-4)
    assert made.loglikelihood_rolling(asked(("",))) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"recipe": "h3o"}, "h2o"),
        ({"recipe": "h2o"}, "none was given"),
        ({"recipe": "h2o", "budget": "lots"}, "budget 'lots'"),
        ({"recipe": "h2o", "budget": "9B"}, "below the floor"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        scorer(monkeypatch, **arguments)


def test_cuda_is_not_insisted_on_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def load_model(source: str, dtype: str, device: str) -> tuple[Any, Any]:
        asked_for.append(device)
        return build("llama"), Tokenizer()

    monkeypatch.setattr(compare, "load_model", load_model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Scorer("tiny", device="cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Scorer("tiny", device="cuda:0")
    assert asked_for == ["auto", "cuda:0"]


def test_answers_are_told_to_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = scorer(monkeypatch), []
    made.cache_hook = SimpleNamespace(add_partial=lambda *a: told.append(a))  # type: ignore[attr-defined]
    (answer,) = made.loglikelihood(asked((CONTEXT, " x")))
    assert told == [("loglikelihood", (CONTEXT, " x"), answer)]


def test_without_the_harness_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'kvloom\[eval\]'"):
        register()


# -- with the harness ----------------------------------------------------------------------------

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_the_harness_runs_a_task_through_the_cache(tmp_path: Path) -> None:
    """In a process of its own, since the harness brings many modules and warnings along."""
    pytest.importorskip("lm_eval")
    filler = "The wind went over the fields, and nobody heard it. " * 12
    records = [
        {
            "question": f"The number of {name}'s key is {right}. {filler}The number of {name}'s key is",
            "choices": [f" {wrong}", f" {right}"],
            "answer": 1,
        }
        for name, right, wrong in (("Clara", 52718, 90341), ("Henry", 31874, 66025))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    script = f"""
import json, lm_eval
from lm_eval.tasks import TaskManager
from kvloom.evaluation.lm_eval import register
register()
def accuracy(recipe, budget):
    arguments = dict(pretrained="testbed", recipe=recipe, dtype="float32", device="cpu")
    found = lm_eval.simple_evaluate(
        model="kvloom", model_args=arguments | ({{"budget": budget}} if budget else {{}}),
        tasks=["tiny_choice"], task_manager=TaskManager(include_path={str(tmp_path)!r}, include_defaults=False),
        bootstrap_iters=0,
    )
    return found["results"]["tiny_choice"]["acc,none"]
print(json.dumps([accuracy("none", None), accuracy("int4", None)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [1.0, 1.0]

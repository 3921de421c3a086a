from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kvloom.cli import compare as command
from kvloom.cli.main import app
from kvloom.core import registry
from kvloom.evaluation import compare
from kvloom.evaluation.ledger import NAME
from kvloom.evaluation.subjects import cells_of

SMALL = ("--tokens", "90", "--prefill", "60", "--needles", "0", "--threads", "1")


def kvloom(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


def test_compare_measures_prints_and_draws(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    args = ("compare", *SMALL, "--recipe", "int4", "--recipe", "h2o", "--budget", "32tok")
    result = kvloom(*args, "--out", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    rows = [json.loads(line) for line in (tmp_path / "a" / NAME).read_text().splitlines()]
    assert [(r["subject"]["recipe"], r["subject"]["budget"]) for r in rows] == [
        ("none", None), ("int4", None), ("h2o", "32tok"),
    ]  # fmt: skip
    for row in rows:
        assert f"{row['quality']['decode_perplexity']:.3f}" in result.output
    assert sorted(os.listdir(tmp_path / "a")) == ["document.png", "quality.png", NAME]
    assert result.stdout.splitlines()[-1].split() == ["figure", str(tmp_path / "a" / "quality.png")]

    again = kvloom(*args, "--out", str(tmp_path / "a"))
    assert "3 of 3 rows were measured before" in again.output
    assert len((tmp_path / "a" / NAME).read_text().splitlines()) == 3
    none = ("compare", *SMALL, "--recipe", "none", "--out", str(tmp_path / "a"), "--again")
    assert "measured before" not in kvloom(*none).output
    assert len((tmp_path / "a" / NAME).read_text().splitlines()) == 4


def test_ctrl_c_keeps_finished_rows_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = compare.Bench.measure

    def stop_at_int4(self: compare.Bench, cell: Any, progress: Any) -> Any:
        if str(cell) == "int4":
            raise KeyboardInterrupt
        return measure(self, cell, progress)

    args = ("compare", *SMALL, "--recipe", "int4", "--out", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(compare.Bench, "measure", stop_at_int4)
        result = kvloom(*args)
    assert result.exit_code == 130
    assert str(tmp_path / NAME) in result.stderr and "same command" in result.stderr
    assert "1 of 2 rows were measured before" in kvloom(*args).output


def test_ctrl_c_before_any_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "prepare", stop)
    result = kvloom("compare", *SMALL, "--out", str(tmp_path / "out"))
    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing was finished yet\n")
    monkeypatch.setattr(command, "run", stop)  # as while transformers is imported
    result = kvloom("compare", *SMALL, "--out", str(tmp_path / "out"))
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_uses_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = command.demo_recipes()
    cells = cells_of(recipes, command.DEMO_BUDGETS)
    assert "int4" in recipes and any("|" in r for r in recipes)
    assert len(cells) == 2 + len(command.DEMO_BUDGETS) * (len(recipes) - 1)
    monkeypatch.setattr(registry, "policies", lambda kind=None: {"h2o": None})
    assert command.demo_recipes() == ["int4", "h2o", "h2o | int4"]


def test_the_demo_is_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "DEMO_BUDGETS", ("40tok",))
    monkeypatch.setattr(command, "FAVOURITES", ("h2o",))
    small = compare.Protocol(tokens=90, prefill=60, needles=1, needle_tokens=120)
    monkeypatch.setattr(command, "DEMO_PROTOCOL", small)
    result = kvloom("demo", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split() == ["figure", str(tmp_path / "quality.png")]


def test_without_recipes_compare_takes_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[command.Options] = []
    monkeypatch.setattr(command, "run", asked.append)
    kvloom("compare")
    kvloom("compare", "--budget", "9tok")
    kvloom("compare", "--needles", "2", "--tokens", "700")
    assert asked[0].recipes == command.demo_recipes()
    assert (asked[0].budgets, asked[1].budgets) == (list(command.DEMO_BUDGETS), ["9tok"])
    assert (asked[2].protocol.needle_tokens, asked[2].protocol.tokens) == (700, 700)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--recipe", "h3o"), ("'h3o'", "did you mean 'h2o'?")),
        (("--recipe", "h2o", "--budget", "lots"), ("'lots'", "'25%'")),
        (("--recipe", "h2o"), ("h2o evicts down to a budget and none was given",)),
        (("--recipe", "int4 @ 25%"), ("'25%'", "nothing in the recipe evicts")),
        (("--recipe", "recompute"), ("recompute(window=1020)",)),
        (("--text", "{tmp}/empty.txt"), ("empty.txt", "empty")),
        (("--text", "{tmp}/short.txt"), ("short.txt", "90 were asked for")),
        (("--text", "no/such"), ("'no/such'", "hub")),
        (("--recipe", "streaming_llm(recent=200)"), ("90 tokens", "shorter than the window")),
        (("--prefill", "89"), ("prefill of 89",)),
        (("--model", "{tmp}"), ("cannot be loaded",)),
        (("--dtype", "int3"), ("'int3'", "bfloat16")),
        (("--device", "abacus"), ("'abacus'",)),
        (("--needles", "1", "--needle-tokens", "9"), ("9 tokens",)),
        (("--out", "{tmp}/short.txt"), ("cannot write results to", "short.txt")),
        (("--out", "{tmp}/foreign"), ("foreign", "nothing was written")),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / NAME).write_text('{"ppl": 3}\n')
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    out = () if "--out" in args else ("--out", str(tmp_path / "out"))
    given = [a.replace("{tmp}", str(tmp_path)) for a in args]
    result = kvloom("compare", *SMALL, *out, *given)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


# -- generate ------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_what_the_cache_held(tmp_path: Path) -> None:
    args = ("--max-new-tokens", "8", "--recipe", "h2o", "--budget", "8tok")
    result = kvloom("generate", "--prompt", "def first(self):\n", *args)
    assert result.exit_code == 0, result.output
    text, _, stats = result.stdout.partition("CompressedCache")
    assert text.strip() and stats.startswith("  h2o  budget 8tok") and "evicted" in stats
    (tmp_path / "p.txt").write_text("def first(self):\n")
    from_file = kvloom("generate", "--prompt-file", str(tmp_path / "p.txt"), *args)
    assert from_file.stdout == result.stdout
    hot = ("--temperature", "2.0", "--seed")
    sampled = [kvloom("generate", "--prompt", "a", *hot, s).stdout for s in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_is_what_the_model_generates() -> None:
    model, tokenizer = compare.load_model("testbed", "float32", "cpu")
    ids = torch.tensor([tokenizer("import ")["input_ids"]])
    out = model.generate(ids, do_sample=False, max_new_tokens=6)
    wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    args = ("--max-new-tokens", "6", "--dtype", "float32")
    assert kvloom("generate", "--prompt", "import ", *args).stdout.startswith(wanted)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("--prompt", "--prompt-file")),
        (("--prompt", "a", "--prompt-file", "b"), ("--prompt", "--prompt-file")),
        (("--prompt", " "), ("empty",)),
        (("--prompt-file", "/no/such/file"), ("'/no/such/file'",)),
        (("--prompt", "a", "--recipe", "h3o"), ("did you mean 'h2o'?",)),
        (("--prompt", "a", "--recipe", "h2o"), ("none was given",)),
        (("--prompt", "a", "--model", "no/model"), ("'no/model'",)),
    ],
)
def test_generate_refuses_wrong_input(args: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = kvloom("generate", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)

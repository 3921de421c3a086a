"""The commands of training/README.md: they parse, end where the shipped weights did, and fit together."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from training import config, corpus, provenance
from training.batches import schedule

from kvloom import testbed
from kvloom.testbed import texts

ROOT = Path(__file__).parents[2]
NAMES = {"R": "training/recipes", "BOOKS": "books.jsonl.xz", "VAL": "val.jsonl.xz"}
PARTS = ("cpu_small", "cpu", "cpu_ship")


def commands() -> list[tuple[str, list[str]]]:
    """Module and arguments of every training command in the page."""
    page = (ROOT / "training" / "README.md").read_text()
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
    named = re.sub(r"\$(\w+)", lambda match: NAMES[match[1]], blocks)
    lines = [shlex.split(line) for line in re.findall(r"python -m (training\..*)", named)]
    return [(module, arguments) for module, *arguments in lines]


def until_tokens() -> int:
    """Where the page's chain leaves the schedule of cpu.toml."""
    (found,) = [arguments for _, arguments in commands() if "--until-tokens" in arguments]
    return int(found[found.index("--until-tokens") + 1])


def test_every_command_of_the_page_parses_and_names_recipes_that_exist() -> None:
    assert len(commands()) >= 7
    for module, arguments in commands():
        import_module(module).parser().parse_args(arguments)
        recipes = [ROOT / argument for argument in arguments if argument.endswith(".toml")]
        assert all(config.load(recipe) for recipe in recipes)


def test_the_recipes_are_those_that_the_shipped_weights_record() -> None:
    made = json.loads((testbed.path() / "training.json").read_text())
    recorded = [*made["earlier_recipes"], made["recipe"]]
    for name, text in zip(PARTS, recorded, strict=True):
        assert config.load(ROOT / f"training/recipes/{name}.toml") == config.parse(text), name


def test_the_chain_ends_at_the_tokens_of_the_shipped_weights() -> None:
    made = json.loads((testbed.path() / "training.json").read_text())
    small, middle, last = (config.load(ROOT / f"training/recipes/{n}.toml") for n in PARTS)
    tokens, ends = 0, []
    for recipe, until in ((small, small.total), (middle, until_tokens()), (last, last.total)):
        for _, before in schedule(recipe, 0, tokens, until):
            tokens = before + recipe.stage(before).batch_tokens
        ends.append(tokens)
    assert ends == [31_006_720, until_tokens(), made["tokens"]]
    # The annealing lowers the rate from its first step on.
    assert abs(last.total - last.optimizer.cooldown - until_tokens()) < 8192


@pytest.fixture
def training_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradients, a library of a few modules; signals and determinism as they were, afterwards."""
    modules = texts.stdlib_split(held_out=False)[:2], texts.stdlib_split(held_out=True)[:1]
    monkeypatch.setattr(texts, "stdlib_split", lambda held_out: modules[held_out])
    monkeypatch.setattr(provenance, "commit", lambda: "abc")
    monkeypatch.setattr(corpus, "documentation", lambda: ["The if statement."])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.enable_grad():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)
    for number, handler in before.items():
        signal.signal(number, handler)


def call(monkeypatch: pytest.MonkeyPatch, module: str, *arguments: object) -> int:
    """The exit status of ``python -m training.MODULE``."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
    try:
        import_module(f"training.{module}").main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_chain_runs_from_texts_to_weights(
    recipe: config.Recipe,
    as_toml: Callable[[config.Recipe], str],
    tmp_path: Path,
    training_session: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def written(name: str, **changes: object) -> Path:
        changed = replace(recipe, **changes)  # type: ignore[arg-type]
        (tmp_path / f"{name}.toml").write_text(as_toml(changed))
        return tmp_path / f"{name}.toml"

    stage = replace(recipe.stages[-1], mixture={"text": 1.0, "questions": 1.0})
    model = replace(recipe.model, vocab=400)
    large = replace(model, hidden=64, intermediate=96, heads=4, kv_heads=2, layers=3)
    small = written("small", model=model, stages=(replace(stage, until=1024),))
    middle = written("middle", model=large, stages=(replace(stage, until=4096),))
    last = written("last", model=large, stages=(replace(stage, until=3072),))
    books, runs = tmp_path / "books.txt", tmp_path / "runs"
    books.write_text("It was late, and nobody had seen the boat. " * 400)

    def train(recipe: Path, name: str, *more: object) -> int:
        return call(
            monkeypatch,
            "train",
            recipe,
            "--texts",
            books,
            "--out",
            runs / name,
            "--threads",
            1,
            *more,
        )

    assert train(small, "small", "--minutes", 0) == os.EX_TEMPFAIL
    assert train(small, "small") == 0
    call(
        monkeypatch,
        "grow",
        runs / "small",
        "--from",
        small,
        "--recipe",
        middle,
        "--out",
        runs / "a",
    )
    assert train(middle, "a", "--until-tokens", 2048) == 0
    assert train(middle, "a", "--until-tokens", 2048) == 0
    shutil.copytree(runs / "a", runs / "b")
    assert train(last, "b") == 0
    earlier = ("--earlier", small, middle)
    call(monkeypatch, "export", runs / "b", "--recipe", last, *earlier, "--to", runs / "weights")

    made = json.loads((runs / "weights" / "training.json").read_text())
    assert (made["tokens"], made["planned_tokens"]) == (3072, 3072)
    assert [session["from_tokens"] for session in made["sessions"]] == [0, 1024, 2048]
    assert [session["recipe"] for session in made["sessions"]] == [
        config.load(path).digest for path in (small, middle, last)
    ]
    assert {session["commit"] for session in made["sessions"]} == {"abc"}
    assert {"kvloom", "transformers", "torch"} <= made["versions"].keys()

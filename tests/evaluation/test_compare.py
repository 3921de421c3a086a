from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom import testbed
from kvloom.core import registry
from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import compare, equal, identity, needles
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.recompute import Recompute
from kvloom.evaluation.subjects import Cell, cells_of, parse, spell_out
from kvloom.hf import load
from kvloom.kernels import ops
from kvloom.kernels.ops import forced_backend
from tests.evaluation.tiny import ByteTokenizer, bench, perturbed
from tests.models import build, tokens

# -- cells ---------------------------------------------------------------------------------------


def test_budgets_cross_the_recipes_that_need_one() -> None:
    recipes = ["int4", "h2o", "h2o|int4 @ 10%", "streaming_llm(recent=20)", "knorm(mode='once')"]
    cells = cells_of([*recipes, "recompute(window=9)", "none"], ["25%", "64tok", "25 %"])
    assert [str(c) for c in cells] == [
        "none", "int4", "h2o @ 25%", "h2o @ 64tok", "h2o | int4 @ 10%", "streaming_llm(recent=20)",
        "knorm(mode='once')", "recompute(window=9, positions=500)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ("h3o", "h2o"),
        ("h2o @ lots", "lots"),
        ("h2o @", "budget ''"),
        ("@ 25%", "recipe"),
        ("", "recipe ''"),
    ],
)
def test_a_wrong_cell_is_named(recipe: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        cells_of([recipe])


@pytest.mark.parametrize(
    "text", ["none", "int4", "h2o | int4", "streaming_llm(recent=20) | lazy(every=64)"]
)
def test_every_parameter_is_spelled_out_and_means_the_same(text: str) -> None:
    recipe = Recipe.parse(text)
    full = spell_out(recipe)
    assert Recipe.parse(full) == recipe
    for policy in recipe.policies:
        for f in dataclasses.fields(policy):
            assert f"{f.name}={getattr(policy, f.name)!r}" in full
    assert ("lazy(every=" in full) == recipe.evicts


# -- keys ----------------------------------------------------------------------------------------


def test_the_key_changes_with_everything_that_determines_a_cell() -> None:
    cell = Cell(parse("h2o"), cells_of(["h2o @ 25%"])[1].budget)
    keys = [
        bench().key(cell),
        bench().key(dataclasses.replace(cell, subject=parse("h2o(sinks=1)"))),
        bench().key(cells_of(["h2o @ 26%"])[1]),
        bench(model=perturbed()).key(cell),
        bench(model=build("llama", dtype=torch.bfloat16)).key(cell),
        bench(model=build("llama_yarn")).key(cell),
        bench(seed=2).key(cell),
        bench(prefill=31).key(cell),
        bench(prefill_chunk=16).key(cell),
        bench(tasks=1).key(cell),
        bench(tasks=2).key(cell),
    ]
    for name in ("source_sha256", "torch", "transformers", "cpu", "capability", "backend"):
        other = bench()
        other.environment = dataclasses.replace(other.environment, **{name: "other"})
        keys.append(other.key(cell))
    threads = bench()
    threads.environment = dataclasses.replace(threads.environment, threads=77)
    keys.append(threads.key(cell))
    assert len(set(keys)) == len(keys)
    same = bench(name="the same weights elsewhere")
    same.environment = dataclasses.replace(same.environment, git="another commit")
    assert same.key(cell) == keys[0]


def test_the_environment_says_which_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.environment(torch.device("cpu"))
    assert before.backend == ops.serving()
    assert before.capability == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("KVLOOM_BACKEND", "reference")
    forced_backend.cache_clear()
    try:
        assert identity.environment(torch.device("cpu")).backend == "reference"
    finally:
        forced_backend.cache_clear()


def test_tasks_differ_by_seed() -> None:
    def tasks(seed: int) -> str:
        made = needles.prepare("words of filler " * 99, ByteTokenizer(), 2, 200, seed)
        return needles.fingerprint(made)

    assert tasks(0) == tasks(0) != tasks(1)
    assert needles.fingerprint([]) == ""


def test_sources_that_only_show_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sha() -> str:
        identity.source_sha256.cache_clear()
        return identity.source_sha256()

    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    for name in ("core/a.py", "cli/main.py", "evaluation/figures.py", "evaluation/measure.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    try:
        first = sha()
        for name in ("cli/main.py", "evaluation/figures.py"):
            (tmp_path / name).write_text("2")
            assert sha() == first
        for name in ("core/a.py", "evaluation/measure.py"):
            (tmp_path / name).write_text("2")
            assert sha() != first
            (tmp_path / name).write_text("1")
            assert sha() == first
        (tmp_path / "core/b.py").write_text("1")
        assert sha() != first
    finally:
        identity.source_sha256.cache_clear()


def test_foreign_policies_count_with_their_source() -> None:
    from tests.evaluation import foreign

    assert identity.foreign_sha256(parse("h2o | int4").policies) == ""  # type: ignore[union-attr]
    assert len(identity.foreign_sha256([foreign.Newest()])) == 64


def test_a_foreign_scorer_counts_inside_of_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.evaluation import foreign

    monkeypatch.setitem(registry._discover(), foreign.Newest.name, foreign.Newest)
    outer = parse("criticalkv(base='foreign_newest')").policies  # type: ignore[union-attr]
    assert identity.foreign_sha256(outer) == identity.foreign_sha256([foreign.Newest()])


def test_a_subclass_counts_with_its_base() -> None:
    from tests.evaluation import foreign

    class Own(foreign.Newest):
        """Lies in another module than its base."""

    alone = identity.foreign_sha256([foreign.Newest()])
    assert identity.foreign_sha256([Own()]) not in ("", alone)


@pytest.mark.parametrize("module", ["__main__", "a.module.that.is.gone"])
def test_rows_of_policies_without_sources_are_never_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    from tests.evaluation import foreign

    monkeypatch.setattr(foreign.Newest, "__module__", module)
    cells = [Cell(Recipe.of(foreign.Newest()), Budget.parse("40tok"))]
    for _ in range(2):
        log = Log()
        compare.run(bench(), cells, Ledger(tmp_path), log)
        assert log.fresh and not log.known


# -- rows ----------------------------------------------------------------------------------------


class Log(Progress):
    def __init__(self) -> None:
        self.fresh: list[str] = []
        self.known: list[str] = []
        self.left = 0

    def cell(self, cell: Cell, number: int, of: int, steps: int) -> None:
        assert 1 <= number <= of
        self.left = steps

    def advance(self, steps: int) -> None:
        self.left -= steps

    def done(self, cell: Cell, row: Any, fresh: bool) -> None:
        assert not fresh or self.left == 0
        (self.fresh if fresh else self.known).append(str(cell))


CELLS = cells_of(["int4", "h2o", "recompute(window=20, positions=3)"], ["50%"])
NAMES = [str(c) for c in CELLS]


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    first = Log()
    rows = compare.run(bench(tasks=1), CELLS[:2], Ledger(tmp_path), first)
    again = Log()
    more = compare.run(bench(tasks=1), CELLS, Ledger(tmp_path), again)
    assert (first.fresh, again.known, again.fresh) == (NAMES[:2], NAMES[:2], NAMES[2:])
    assert more[:2] == rows and [r.subject.budget for r in more] == [None, None, "50%", None]
    assert Ledger(tmp_path).path.read_text().count("\n") == 4


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    class Interrupted(Log):
        def cell(self, cell: Cell, number: int, of: int, steps: int) -> None:
            if number == 3:
                raise KeyboardInterrupt
            super().cell(cell, number, of, steps)

    with pytest.raises(KeyboardInterrupt):
        compare.run(bench(), CELLS, Ledger(tmp_path), Interrupted())
    log = Log()
    compare.run(bench(), CELLS, Ledger(tmp_path), log)
    assert (log.known, log.fresh) == (NAMES[:2], NAMES[2:])


def test_other_weights_are_measured_anew(tmp_path: Path) -> None:
    compare.run(bench(), CELLS[:1], Ledger(tmp_path), Log())
    log = Log()
    compare.run(bench(model=perturbed()), CELLS[:1], Ledger(tmp_path), log)
    assert log.fresh == NAMES[:1]


def test_a_row_says_what_it_is(tmp_path: Path) -> None:
    made = bench(tasks=2)
    row = compare.run(made, [CELLS[2]], Ledger(tmp_path), Log())[0]
    assert row.model.name == "tiny" and row.model.sha256 == identity.model_sha256(made.model)
    assert (row.model.layers, row.model.kv_heads, row.model.head_dim) == (3, 2, 16)
    assert row.model.parameters == sum(p.numel() for p in made.model.parameters())
    assert row.subject.full.startswith("h2o(recent=0.5, sinks=0) | lazy(every=1")
    assert row.protocol.needle_sha256 and (row.quality.needles, row.text.tokens) == (2, 60)
    assert row.environment.torch == torch.__version__ and row.environment.device == "cpu"
    assert row.key == made.key(CELLS[2]) and row.counts.evicted > 0
    assert row.subject.evicts and (row.bytes.avg_key_bits, row.bytes.avg_value_bits) == (32, 32)
    assert not compare.run(made, CELLS[:1], Ledger(tmp_path), Log())[0].subject.evicts


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [("knormpress", None), ("streaming_llm(recent=50) | lazy(every=32)", None), ("h2o", "1MiB")],
)
def test_a_recipe_that_had_nothing_to_evict_is_named(
    tmp_path: Path, recipe: str, budget: str | None
) -> None:
    cells = cells_of([recipe], [budget] if budget else [])
    rows = compare.run(bench(), cells, Ledger(tmp_path), Log())
    assert [equal.idle(row) for row in rows] == [False, True]
    assert "Never evicted" in equal.remarks(rows)[-1]


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ("h2o", "none was given"),
        ("int4 @ 25%", "nothing in the recipe evicts"),
        ("h2o @ 10B", "below the floor"),
        ("recompute(window=20) @ 25%", "keeps no cache"),
        ("recompute(window=100)", "shorter than the window"),
        ("h2o @ 100tok", "shorter than the window of 'h2o @ 100tok'"),
    ],
)
def test_a_cell_that_cannot_be_measured_stops_all_before_any_work(
    tmp_path: Path, recipe: str, word: str
) -> None:
    log = Log()
    with pytest.raises(ValueError, match=word):
        compare.run(bench(), cells_of([recipe]), Ledger(tmp_path), log)
    assert log.fresh == [] and list(tmp_path.iterdir()) == []


# -- needles -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    load.quiet()
    return load.pretrained(testbed.path(), torch.float32)


def test_the_testbed_finds_needles_unless_they_are_evicted(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    filler = "\n".join(testbed.texts.held_out_texts()[:3])
    tasks = needles.prepare(filler, tokenizer, 4, 300, seed=0)
    assert all(240 < len(t.context) + len(t.question) <= 300 for t in tasks)
    assert [t.example.depth for t in tasks] == [0.125, 0.375, 0.625, 0.875]
    full = [needles.answered(model, tokenizer, Recipe(), None, t) for t in tasks]
    window = parse("streaming_llm(recent=24)")
    evicted = [needles.answered(model, tokenizer, window, None, t) for t in tasks]
    short = [needles.answered(model, tokenizer, Recompute(40), None, t) for t in tasks]
    assert sum(full) >= 3 and not any(evicted) and not any(short)


def test_tasks_need_room_and_filler(trained: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="20 tokens"):
        needles.prepare("words " * 999, trained[1], 1, 20, 0)
    with pytest.raises(ValueError, match="too short for needle tasks of 500"):
        needles.prepare("few words", trained[1], 1, 500, 0)


# -- models --------------------------------------------------------------------------------------


def test_a_full_cache_on_the_testbed_equals_one_pass(
    trained: tuple[Any, Any], tmp_path: Path
) -> None:
    model, _ = trained
    made = compare.prepare(
        "testbed",
        "stdlib",
        compare.Protocol(tokens=150, prefill=80, prefill_runs=1),
        "float32",
        "cpu",
    )
    ids = made.document.ids
    logits = model(ids[None], use_cache=False).logits[0, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits, ids[1:])
    row = compare.run(made, cells_of([]), Ledger(tmp_path), Log())[0]
    assert row.quality.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("source", "dtype", "device", "word"),
    [
        ("testbed", "int8", "cpu", "dtype 'int8'"),
        ("testbed", "float32", "abacus", "device 'abacus'"),
        ("testbed", "float32", "cuda:9", "device 'cuda:9'"),
        ("nobody/nothing", "float32", "cpu", "model 'nobody/nothing' cannot be loaded"),
    ],
)
def test_a_wrong_model_is_named(source: str, dtype: str, device: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        compare.load_model(source, dtype, device)


def test_weights_are_identified_not_names() -> None:
    assert identity.model_sha256(build("llama")) == identity.model_sha256(build("llama"))
    assert identity.model_sha256(build("llama")) != identity.model_sha256(perturbed())
    assert identity.tokens_sha256(tokens(5)) != identity.tokens_sha256(tokens(6))


def test_a_checkout_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity._commit.cache_clear()
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    try:
        assert identity._commit() is None
    finally:
        identity._commit.cache_clear()

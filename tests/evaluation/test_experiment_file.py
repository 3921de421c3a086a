"""Experiments as text: grids, scales, names, braces, and what is refused."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from kvloom.evaluation import settings
from kvloom.evaluation.experiment_file import read

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
HEAD = 'title = "A title"\n'
GRID = HEAD + '[[grid]]\nname = "g"\nrecipes = ["int4"]\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "e.toml"
    path.write_text(text, encoding="utf-8")
    return path


def specs(tmp_path: Path, text: str, **how: object) -> list:
    return [o.spec for o in read(written(tmp_path, text), **how)[0].outcomes]


def test_a_grid_crosses_texts_recipes_budgets_and_repeats(tmp_path: Path) -> None:
    text = HEAD + (
        '[defaults]\ntext = ["a", "b"]\n[[grid]]\nname = "g"\nrecipes = ["int4", "knorm"]\n'
        'budgets = ["{50,25}%"]\nrepeats = 2\nseed = 7\n'
    )
    found = specs(tmp_path, text)
    one = [("none", None), ("int4", None), ("knorm", "50%"), ("knorm", "25%")]
    assert [(s.recipe, s.budget) for s in found] == one * 4
    assert [(s.text, s.seed) for s in found[::4]] == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]


def test_scales_replace_defaults_and_what_a_grid_says(tmp_path: Path) -> None:
    text = (
        GRID
        + 'quick = { tokens = 99 }\n[defaults]\nprefill = 30\n[quick]\nprefill = 20\n[paper]\nmodel = "big"\n'
    )
    (_, plain), (_, quick), (_, paper) = (
        specs(tmp_path, text, scale=s) for s in ("testbed", "quick", "paper")
    )
    assert (plain.options["tokens"], plain.options["prefill"], plain.model) == (1024, 30, "testbed")
    assert (quick.options["tokens"], quick.options["prefill"]) == (99, 20)
    assert (paper.options["tokens"], paper.model) == (1024, "big")
    assert {s.model for s in specs(tmp_path, text, scale="paper", model="mine")} == {"mine"}


def test_phases_choose_grids(tmp_path: Path) -> None:
    text = GRID + 'phase = 1\n[[grid]]\nname = "h"\nphase = 2\nrecipes = ["int8"]\n'
    assert {s.grid for s in specs(tmp_path, text, phases=(2,))} == {"h"}
    with pytest.raises(ValueError, match="no grid of phase 3"):
        specs(tmp_path, text, phases=(3,))
    # what other phases need does not have to be there
    assert specs(tmp_path, text + 'text = "${UNSET}"\n', phases=(1,))


def test_a_model_of_ones_own_is_used_by_fallbacks_too(tmp_path: Path) -> None:
    text = GRID + '[[fallback]]\nmodel = "small"\n[[fallback]]\nmodel = "tiny"\nprefill_chunk = 8\n'
    assert len(read(written(tmp_path, text))[1]) == 2
    assert read(written(tmp_path, text), model="mine")[1] == [{"prefill_chunk": 8}]


def test_names_braces_and_seeds(tmp_path: Path) -> None:
    text = HEAD + (
        '[[grid]]\nname = "g"\nseed = 3\nrecipes = ["strict: streaming_llm(sinks={2,4}, recent=60)", '
        '"random(seed={seed})"]\nbudgets = ["25%"]\n'
        '[[claim]]\nrecipe = "strict"\nmetric = "kl"\nvalue = 1\nwhere = "x"\n'
    )
    experiment, _ = read(written(tmp_path, text))
    labels = [o.spec.label for o in experiment.outcomes]
    assert labels == ["none", "strict", "strict", "random(seed=3) @ 25%"]
    assert [len(experiment.claims_of(o)) for o in experiment.outcomes] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title = 3", "'title' must be a text"),
        (HEAD, "no grid"),
        (GRID + "tokns = 3", "grid 'g' has no 'tokns'; did you mean 'tokens'"),
        (GRID + 'tokens = "3"', "tokens is '3', not of type int"),
        (GRID + 'kind = "dokument"', "kind 'dokument': one of"),
        (GRID.replace("int4", "int5"), "int5"),
        (GRID + 'budgets = ["most"]', "most"),
        (GRID + "[[fallback]]\nprefil = 3", "fallback has no 'prefil'"),
        (GRID + '[[claim]]\nrecipe="none"\nmetric="speed"\nvalue=1\nwhere="x"', "metric 'speed'"),
        (GRID + '[[figure]]\ntitle = "x"', "it needs a kind"),
        ("title", "e.toml"),
        (GRID + 'threads = "2"', "threads is '2', not of type int"),
        (GRID + 'synthetic = "no"', "synthetic is 'no', not of type bool"),
        (GRID + 'dtype = "fp8"', "dtype 'fp8': one of"),
        (GRID + "repeats = 0", "repeats 0: at least 1"),
        (GRID + 'kind = "task"\ntask = "needle(lenght=99)"', "lenght"),
        (GRID + '[[grid]]\nname = "g"\nrecipes = []', "two grids of one name"),
        (GRID + '[[figure]]\nkind = "table"\ngrid = "h"', "there is no grid 'h'"),
        (GRID + '[[fallback]]\nprefill_chunk = 3\nrepeats = 2', "fallback has no 'repeats'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, text: str, words: str) -> None:
    if "budgets" in text:
        text = text.replace("int4", "knorm")
    with pytest.raises(ValueError) as error:
        read(written(tmp_path, text))
    assert words in str(error.value)


@pytest.mark.parametrize("scale", ["testbed", "quick", "paper"])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_ours_can_be_read_and_every_claim_has_its_cell(
    path: Path, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LONGBENCH", "LONGBENCH_PROMPTS", "GSM8K"):
        monkeypatch.setenv(name, "somewhere")
    experiment, _ = read(path, scale)
    claimed = {id(c) for o in experiment.outcomes for c in experiment.claims_of(o)}
    lost = [c for c in experiment.claims if id(c) not in claimed]
    assert scale == "quick" or not lost
    grids = {o.spec.grid for o in experiment.outcomes}
    for figure in experiment.figures:
        kind = import_module(f"kvloom.evaluation.report.kinds.{figure.kind}")
        assert figure.grid in grids | {None} and set(figure.options) <= set(kind.OPTIONS)


def test_variables_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        GRID
        + 'tokens = "${TOKENS:-777}"\ntext = "${BOOKS}/one.txt"\n[grid.paper]\nmodel = "${UNSET}"\n'
    )
    with pytest.raises(ValueError, match=r"\$\{BOOKS\}: BOOKS is not set"):
        specs(tmp_path, text)
    (tmp_path / ".env").write_text("BOOKS=/books\nTOKENS=1\n")
    monkeypatch.setenv("TOKENS", "99")
    monkeypatch.delenv("BOOKS", raising=False)
    assert settings.load_dotenv(tmp_path) == ["BOOKS"]
    monkeypatch.setenv("BOOKS", "/books")  # so that it is taken back after the test
    first = specs(tmp_path, text)[0]
    assert (first.options["tokens"], first.text) == (99, "/books/one.txt")


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    text = page.split("```toml\n")[1].split("```")[0]
    experiment, fallbacks = read(written(tmp_path, text))
    assert fallbacks == [{"prefill_chunk": 256}]
    # full cache, int4, and two that state their size: on two texts, three times
    assert len(experiment.outcomes) == 4 * 2 * 3
    assert len(specs(tmp_path, text, scale="quick")) == 4 * 2
    assert [len(experiment.claims_of(o)) for o in experiment.outcomes[:4]] == [0, 1, 0, 0]

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvloom.cli.main import app
from kvloom.evaluation import manifold, projection, spectrum

SMALL = (
    "--length", "128", "--chunk", "32", "--layer", "1", "--head", "1", "--device", "cpu", "--budget",
    "48tok", "--recipe", "streaming_llm(positions='original') | mean_centroid",
)  # fmt: skip


def kvloom(*args: str) -> Result:
    return CliRunner().invoke(app, ["analyze", *args], catch_exceptions=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("analyze")
    made = {name: root / name for name in ("manifold", "attention")}
    extra = {"manifold": ("--topics", "--passage", "16"), "attention": ()}
    for name, folder in made.items():
        result = kvloom(name, *SMALL, *extra[name], "--out", str(folder))
        assert result.exit_code == 0, result.output
        assert f"row     {folder}/{name}.jsonl" in result.output
        assert f"figure  {folder}/{name}.png" in result.output
    return made


def test_rows_data_and_figures_are_there(folders: dict[str, Path]) -> None:
    files = {name: sorted(p.name for p in path.iterdir()) for name, path in folders.items()}
    assert files["attention"] == ["attention.jsonl", "attention.png", "attention.safetensors"]
    assert files["manifold"] == [
        "manifold.jsonl", "manifold.png", "manifold.safetensors", "transitions.png",
    ]  # fmt: skip
    row, tensors = manifold.load(folders["manifold"])
    assert [t.name for t in row.topics] == ["code", "reference", "lists"]
    assert [p.name for p in row.projections][:2] == ["pca", "tsne"]
    assert tensors["tsne_keys"].shape == (128, 2)
    assert (row.setting.layer, row.setting.head, row.setting.subject.budget) == (1, 1, "48tok")
    other, _ = spectrum.load(folders["attention"])
    assert other.queries == 64 and other.setting.text.name == "stdlib"


@pytest.mark.parametrize("name", ["manifold", "attention"])
def test_figures_are_drawn_again_from_what_is_there(folders: dict[str, Path], name: str) -> None:
    figures = list(folders[name].glob("*.png"))
    before = [path.read_bytes() for path in figures]
    for path in figures:
        path.unlink()
    result = kvloom(name, "--draw-only", str(folders[name]))
    assert result.exit_code == 0, result.output
    assert [path.read_bytes() for path in figures] == before


def test_a_folder_is_written_over_only_by_force(folders: dict[str, Path]) -> None:
    folder = folders["attention"]
    before = (folder / "attention.jsonl").read_bytes()
    refused = kvloom("attention", *SMALL, "--out", str(folder))
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert (folder / "attention.jsonl").read_bytes() == before
    assert kvloom("attention", *SMALL, "--out", str(folder), "--force").exit_code == 0
    assert (folder / "attention.jsonl").read_bytes() != before  # at least the time


def test_a_missing_scikit_learn_ends_it_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    result = kvloom("manifold", "--model", "no/model", "--out", str(tmp_path / "new"))
    assert result.exit_code == 2 and "pip install 'kvloom[analyze]'" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("manifold", "--recipe", "h2o", "--budget", "64tok"), ("'h2o'", "keeps centroids")),
        (("attention", *SMALL, "--layer", "9"), ("layer 9", "0 to 3")),
        (("attention", *SMALL, "--head", "2"), ("head 2", "0 to 1")),
        (("attention", *SMALL, "--length", "40"), ("40 tokens", "too short")),
        (("manifold", "--text", "stdlib", "--text", "stdlib_train"), ("--topics",)),
        (("manifold", "--topics", "--length", "100"), ("100 tokens", "passage of 128")),
        (("manifold", "--draw-only", "no/folder"), ("no/folder", "no results")),
        (("attention", "--text", "no/text.txt"), ("no/text.txt", "no such file")),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, args: tuple[str, ...], words: tuple) -> None:
    result = kvloom(*args, "--out", str(tmp_path / "new"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
    assert not (tmp_path / "new").exists()

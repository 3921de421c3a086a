from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvloom.cli.main import app
from kvloom.evaluation import calibrate, compare
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.subjects import cells_of
from kvloom.formats._calibration import Calibration

SMALL = ("--samples", "2", "--length", "96", "--bits", "3", "--device", "cpu")


def kvloom(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "new" / "c.safetensors"
    result = kvloom("calibrate", "testbed", "--out", str(path), *SMALL)
    assert result.exit_code == 0, result.output
    assert f"recipe  kvquant(bits=3, calibration='{path}')" in result.output
    return path


def test_the_file_says_where_it_comes_from(file: Path) -> None:
    made = Calibration.load(file)
    facts = made.facts
    assert (made.bits, made.outliers, made.shape) == (3, 0.01, (4, 2, 64))
    assert (facts["model"], facts["text"]) == ("testbed", "stdlib_train")
    assert (facts["samples"], facts["length"], facts["text_tokens"]) == ("2", "96", "192")
    assert all(len(facts[f"{name}_sha256"]) == 64 for name in ("model", "config", "text"))
    assert {"kvloom", "torch", "transformers"} < set(facts)
    assert len(made.text_blocks) == 3


def test_a_comparison_takes_the_file_and_other_texts_only(file: Path, tmp_path: Path) -> None:
    recipe = f"kvquant(bits=3, calibration={str(file)!r})"
    protocol = compare.Protocol(tokens=100, prefill=90, prefill_runs=1)
    bench = compare.prepare("testbed", "stdlib", protocol, "float32", "cpu")
    ledger = Ledger(tmp_path)
    row = compare.run(bench, cells_of([recipe]), ledger, compare.Progress())[-1]
    assert row.subject.recipe == recipe and "calibration='sha256:" in row.subject.full
    assert ledger.path.read_text().count("sha256:") == 1
    args = ("compare", "--recipe", recipe, "--tokens", "100", "--prefill", "90", "--needles", "0")
    refused = kvloom(*args, "--text", "stdlib_train", "--out", str(tmp_path / "no"))
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "text 'stdlib_train' cannot judge recipe" in refused.stderr


def test_an_existing_file_is_replaced_only_by_force(file: Path) -> None:
    before = file.read_bytes()
    args = ("calibrate", "testbed", "--out", str(file), *SMALL)
    refused = kvloom(*args)
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert file.read_bytes() == before
    assert kvloom(*args, "--force").exit_code == 0
    assert file.read_bytes() == before  # the same text, the same file


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "record", stop)
    result = kvloom("calibrate", "testbed", "--out", str(tmp_path / "c.safetensors"), *SMALL)
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("testbed", "--bits", "5"), ("bits=5", "4, 3 or 2")),
        (("testbed", "--outliers", "0.7"), ("outliers",)),
        (("testbed", "--text", "no/text.txt"), ("no/text.txt", "no such file")),
        (("no/model",), ("'no/model'",)),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, args: tuple[str, ...], words: tuple) -> None:
    result = kvloom("calibrate", "--out", str(tmp_path / "c.safetensors"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
    assert not (tmp_path / "c.safetensors").exists()

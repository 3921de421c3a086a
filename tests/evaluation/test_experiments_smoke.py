"""Every experiment's quick version, a cell of each of its grids, with little after the prefill; and a report of one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvloom.cli.main import app
from kvloom.evaluation import runner
from kvloom.evaluation.experiment import Experiment, Outcome, Spec, load
from kvloom.evaluation.experiment_file import read

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of each LongBench task, and one of GSM8K, where the variables say."""
    record = {"input": "Where?", "context": "It lies in the harbour. " * 60, "answers": ["harbour"], "all_classes": None}  # fmt: skip
    for task in ("hotpotqa", "trec", "lcc"):
        classes = ["harbour", "station"] if task == "trec" else None
        line = json.dumps(record | {"dataset": task, "all_classes": classes})
        (tmp_path / f"{task}.jsonl").write_text(line + "\n")
    sums = {"question": "Two and two looms?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(sums) + "\n")
    monkeypatch.setenv("LONGBENCH", str(tmp_path))
    monkeypatch.setenv("GSM8K", str(tmp_path / "gsm8k.jsonl"))


def _first_of_each_grid(experiment: Experiment) -> list[Outcome]:
    """The first cell that is no full cache; it has one beside it anyway."""
    found: dict[str, Outcome] = {}
    for o in experiment.outcomes:
        if o.spec.recipe != "none":
            found.setdefault(o.spec.grid, o)
    return list(found.values())


def _light(spec: Spec) -> Spec:
    """A few tokens one by one, one needle or example, a short analysis, bytes matched in the first phase alone:
    that cells of this kind run does not take more.
    """
    o = spec.options
    least = {
        "tokens": o.get("prefill", 0) + 12, "needles": min(1, o.get("needles", 0)),
        "length": 320, "passage": 64, "equal_bytes": o.get("equal_bytes", False) and spec.phase == 1,
    }  # fmt: skip
    task = spec.task and re.sub(r"examples=\d+", "examples=1", spec.task)
    own = {k: v for k, v in least.items() if k in o}
    return dataclasses.replace(spec, task=task, options=o | own)


def _run(path: Path, folder: Path, grids: set[str] | None = None) -> Experiment:
    experiment, fallbacks = read(path, "quick")
    wanted = {o.spec.grid for o in experiment.outcomes} if grids is None else grids
    experiment.outcomes = [o for o in _first_of_each_grid(experiment) if o.spec.grid in wanted]
    assert {o.spec.grid for o in experiment.outcomes} == wanted
    for outcome in experiment.outcomes:
        outcome.spec = _light(outcome.spec)
    return runner.run(experiment, fallbacks, folder)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_a_cell_of_each_grid_runs(path: Path, tmp_path: Path, data: None) -> None:
    experiment = _run(path, tmp_path / "out")
    assert runner.failures(experiment) == []
    assert all(o.key for o in experiment.outcomes)


def test_the_report_of_such_a_folder(tmp_path: Path) -> None:
    path = next(p for p in EXPERIMENTS if p.stem == "ruler")
    _run(path, tmp_path / "out", {"needles"})
    done = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report" / "report.html").read_text(encoding="utf-8")
    (outcome,) = load(tmp_path / "out").outcomes
    assert outcome.key is not None and f"row-{outcome.key[:16]}" in page

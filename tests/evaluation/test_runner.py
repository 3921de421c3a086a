"""The runner: nothing is measured twice, nothing stale is used, nothing that fails is lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvloom.evaluation import cells, runner
from kvloom.evaluation.cells import OUT_OF_MEMORY, Finished, Workplace
from kvloom.evaluation.executors import Order, executor
from kvloom.evaluation.executors.process import Worker
from kvloom.evaluation.experiment import Experiment, load
from kvloom.evaluation.experiment_file import read
from kvloom.evaluation.ledger import NAME as ROWS
from kvloom.evaluation.ledger import Ledger

FILE = """
title = "Small"
[defaults]
text = "TEXT"
dtype = "float32"
device = "cpu"
threads = 1
tokens = 44
prefill = 40
prefill_runs = 1
[[grid]]
name = "documents"
recipes = ["int4", "streaming_llm(recent=24)"]
[[grid]]
name = "tasks"
kind = "task"
task = "key_value(pairs=4, examples=1)"
filler = "TEXT"
recipes = ["int4"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    text = tmp_path / "words.txt"
    text.write_text("The loom weaves many threads into one cloth. " * 400)
    path = tmp_path / "small.toml"
    path.write_text(FILE.replace("TEXT", str(text)))
    return path


def run(file: Path, folder: Path, **how: Any) -> Experiment:
    experiment, fallbacks = read(file)
    return runner.run(experiment, fallbacks, folder, **how)


def figures(folder: Path) -> dict[str, Any]:
    """Rows without what depends on clock and machine, by key."""
    found = {}
    for key, row in Ledger(folder).rows.items():
        fields = json.loads(row.to_json())
        for name in ("measured_at", "took", "timing", "environment"):
            fields.pop(name, None)
        if "series" in fields:
            fields["series"] = {k: v for k, v in fields["series"].items() if "seconds" not in k}
        found[key] = fields
    return found


def test_cells_are_measured_once_and_the_record_names_their_rows(
    file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    first = run(file, folder)
    assert [o.spec.label for o in first.outcomes] == ["none", "int4", "streaming_llm(recent=24)", "none", "int4"]  # fmt: skip
    assert all(o.row is not None and o.row.key == o.key for o in first.outcomes)
    again = load(folder)
    assert [o.key for o in again.outcomes] == [o.key for o in first.outcomes]
    assert [o.row for o in again.outcomes] == [o.row for o in first.outcomes]
    lines = (folder / "results.jsonl").read_text()
    run(file, folder)
    assert (folder / "results.jsonl").read_text() == lines


def test_a_changed_text_or_setting_is_measured_anew(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    before = {o.key for o in run(file, folder).outcomes}
    words = tmp_path / "words.txt"
    words.write_text(words.read_text().replace("threads", "needles"))
    after = [o.key for o in run(file, folder).outcomes]
    assert not before & set(after[:3])  # documents are of this text
    file.write_text(file.read_text().replace("prefill = 40", "prefill = 41"))
    last = [o.key for o in run(file, folder).outcomes]
    assert not set(after[:3]) & set(last[:3])
    assert after[3:] == last[3:]  # tasks have no prefill, and a filler that they do not use
    # the record speaks of this run alone
    assert [o.key for o in load(folder).outcomes] == last


@pytest.mark.parametrize("where", ["process", pytest.param("ray", marks=pytest.mark.full)])
def test_other_executors_give_the_same_rows(file: Path, tmp_path: Path, where: str) -> None:
    if where == "ray":
        pytest.importorskip("ray")
    run(file, tmp_path / "inline")
    found = run(file, tmp_path / where, name=where, workers=2 if where == "ray" else 1)
    assert not runner.failures(found)
    assert figures(tmp_path / where) == figures(tmp_path / "inline")


def test_wrong_input_of_one_cell_does_not_stop_the_others(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace('"int4", "str', '"int4", "streaming_llm(recent=2000)", "str'))  # fmt: skip
    found = run(file, tmp_path / "out")
    ((spec, why),) = runner.failures(found)
    assert spec.recipe == "streaming_llm(recent=2000)" and "shorter than the window" in why
    assert runner.summary(found) == {"cells": 6, "measured": 5, "failed": 1, "fallbacks": 0}
    assert load(tmp_path / "out").outcomes[2].failed == why


def test_when_memory_runs_out_the_files_fallbacks_are_tried_and_recorded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(file.read_text() + "[[fallback]]\nprefill_chunk = 30\n[[fallback]]\nprefill_chunk = 10\n")  # fmt: skip
    measure = cells.Bench.measure

    def short_of_memory(bench: Any, cell: Any, progress: Any) -> Any:
        if cell.facts.recipe == "int4" and bench.protocol.prefill_chunk != 10:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return measure(bench, cell, progress)

    monkeypatch.setattr(cells.Bench, "measure", short_of_memory)
    outcome = run(file, tmp_path / "out").outcomes[1]
    assert outcome.fallback == {"prefill_chunk": 10}
    assert outcome.row is not None and outcome.row.protocol.prefill_chunk == 10
    assert load(tmp_path / "out").outcomes[1].fallback == {"prefill_chunk": 10}


def test_a_defect_in_one_cell_is_recorded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cells.Bench, "measure", broken)
    found = run(file, tmp_path / "out")
    assert [why for _, why in runner.failures(found)] == ["ZeroDivisionError: division by zero"] * 3
    assert [o.failed for o in found.outcomes[3:]] == [None, None]


def test_a_killed_worker_counts_as_out_of_memory_and_is_replaced(file: Path) -> None:
    spec = read(file)[0].outcomes[0].spec
    worker = Worker()
    try:
        assert worker.ask(replace(spec, text="nowhere.txt"), []).failed is not None
        assert worker._process is not None
        worker._process.send_signal(signal.SIGKILL)
        worker._process.wait()
        dead = worker.ask(spec, [])
        assert (dead.failed or "").startswith(OUT_OF_MEMORY)
        assert worker.ask(spec, []).row is not None
    finally:
        worker.stop()


def test_known_keys_are_not_measured(file: Path) -> None:
    spec, place = read(file)[0].outcomes[0].spec, Workplace()
    done = place.work(spec, ())
    assert done.key and place.work(spec, {done.key}) == Finished(key=done.key)


def test_phases_one_after_the_other_end_in_one_record(file: Path, tmp_path: Path) -> None:
    text = file.read_text().replace('name = "documents"', 'name = "documents"\nphase = 1')
    file.write_text(text.replace('name = "tasks"', 'name = "tasks"\nphase = 2'))
    folder = tmp_path / "out"
    for phase in (1, 2):
        experiment, fallbacks = read(file, phases=(phase,))
        runner.run(experiment, fallbacks, folder, keep=True)
    assert sorted(o.spec.grid for o in load(folder).outcomes) == ["documents"] * 3 + ["tasks"] * 2
    assert all(o.row is not None for o in load(folder).outcomes)


def test_a_run_that_is_killed_before_its_first_cell_keeps_the_record(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [o.key for o in run(file, tmp_path / "out").outcomes]

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workplace, "work", killed)
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "out")
    assert [o.key for o in load(tmp_path / "out").outcomes] == keys
    # but not with rows of another kvloom, which would look like this run's
    monkeypatch.setattr(runner, "source_sha256", lambda: "other")
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path / "out")
    assert [o.key for o in load(tmp_path / "out").outcomes] == [None] * len(keys)


def test_stopped_workers_take_no_further_cell(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    asked: list[int] = []

    class Slow(Worker):
        def ask(self, spec: Any, known: list[str]) -> Finished:
            if self._stopped:
                return Finished(failed="stopped")
            asked.append(spec.repeat)
            time.sleep(0.05)
            return Finished(key=str(spec.repeat))

    monkeypatch.setattr("kvloom.evaluation.executors.process.Worker", Slow)
    spec = read(file)[0].outcomes[0].spec
    specs = {i: replace(spec, repeat=i) for i in range(9)}
    going = executor("process")(Order(specs, [], (), 1, runner.Watcher()))
    next(going)
    going.close()
    before = len(asked)
    time.sleep(0.2)
    assert before <= 3 and len(asked) == before


def test_memory_that_runs_out_in_an_analysis_is_its_result_too(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "words.txt"
    file.write_text(
        f'title = "A"\n[defaults]\ntext = "{text}"\ndtype = "float32"\n[[fallback]]\nmodel = "testbed"\n'
        '[[grid]]\nname = "a"\nkind = "attention"\nlength = 64\nchunk = 16\n'
        'recipes = ["mp_kvm(window_size=24, max_centroids=4)"]\n'
    )
    whole = run(file, tmp_path / "out").outcomes[0]
    assert whole.key and list((tmp_path / "out" / "attention").glob("*/attention.jsonl"))

    def short(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("kvloom.evaluation.spectrum.analyze", short)
    outcome = run(file, tmp_path / "other").outcomes[0]
    assert (outcome.failed or "").startswith(OUT_OF_MEMORY) and outcome.fallback == {
        "model": "testbed"
    }


def test_unknown_executors_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="executor 'slurm': one of inline, process, ray"):
        run(file, tmp_path / "out", name="slurm")
    assert not (tmp_path / "out").exists()
    order = Order({}, [], (), None, runner.Watcher())
    assert list(executor("inline")(order)) == []


def _lines(folder: Path) -> int:
    path = folder / ROWS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _kills(file: Path, folder: Path, times: int) -> None:
    """Run the experiment, killed so many times, then to its end."""
    command = [sys.executable, "-m", "kvloom.cli.main", "run", str(file), "--out", str(folder)]
    rng = random.Random(0)
    start = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--dry-run"], check=True, **quiet)
    importing = time.monotonic() - start
    rows, hit = [], 0
    for i in range(times):
        child = subprocess.Popen(command, **quiet)
        if i % 2:  # soon after its next row, however long a row takes here
            have = _lines(folder)
            while child.poll() is None and _lines(folder) == have:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(importing * rng.uniform(0.5, 1.8))
        hit += child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        rows.append(len(Ledger(folder).rows))
    subprocess.run(command, check=True, **quiet)
    assert rows == sorted(rows)
    if times > 2:  # some kills fell between the first row and the last
        assert hit and len({n for n in rows if 0 < n < len(Ledger(folder).rows)}) >= times // 4


@pytest.mark.full
@pytest.mark.parametrize("times", [2, 20])
def test_killed_at_random_moments_the_rows_are_the_same(
    file: Path, tmp_path: Path, times: int
) -> None:
    # cells enough for every kill to find some left
    windows = [f'"streaming_llm(recent={n})"' for n in range(14, 14 + 2 * times)]
    longer = file.read_text().replace("tokens = 44", "tokens = 100")
    file.write_text(longer.replace('"streaming_llm(recent=24)"', ", ".join(windows)))
    run(file, tmp_path / "whole")
    _kills(file, tmp_path / "killed", times)
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert [o.key for o in load(tmp_path / "killed").outcomes] == list(figures(tmp_path / "whole"))

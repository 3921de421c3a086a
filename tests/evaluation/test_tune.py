"""Searches: the best allowed candidate wins, a killed search goes on, nothing is measured twice."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kvloom.evaluation import tune
from kvloom.evaluation.search import Search, Space, read
from kvloom.evaluation.subjects import parse

pytest.importorskip("optuna")
PRESETS = sorted((Path(__file__).parents[2] / "experiments" / "tune").glob("*.toml"))
FILE = """
goal = "bytes"
metric = "kl"
limit = LIMIT
[cell]
text = "TEXT"
dtype = "float32"
device = "cpu"
threads = 1
tokens = 80
prefill = 64
prefill_runs = 1
[[space]]
recipe = "{format}"
format = ["int8", "int4", "int2"]
[[space]]
recipe = "streaming_llm(sinks={sinks}) | {format}"
budget = "{share}%"
sinks = { low = 1, high = 3 }
share = { low = 20.5, high = 60.5 }
format = ["int8"]
"""


def search(tmp_path: Path, limit: str = "0.5", **replaced: str) -> Search:
    words = tmp_path / "words.txt"
    words.write_text("The loom weaves many threads into one cloth. " * 100)
    text = FILE.replace("LIMIT", limit).replace("TEXT", str(words))
    for old, new in replaced.items():
        text = text.replace(old, new)
    path = tmp_path / "search.toml"
    path.write_text(text)
    return read(path)


def test_the_smallest_allowed_candidate_wins_and_is_written(tmp_path: Path) -> None:
    found = tune.run(search(tmp_path), tmp_path / "out", 8)
    winner = tune.best(found)
    assert winner is not None and winner.row is not None and winner.row.quality.kl <= 0.5
    allowed = [t for t in found if t.row is not None and t.row.quality.kl <= 0.5]
    held = {t.number: t.row.bytes.compressed_mean / t.row.bytes.dense_mean for t in allowed}  # type: ignore[union-attr]
    assert held[winner.number] == min(held.values())
    text = (tmp_path / "out" / tune.BEST).read_text().strip()
    recipe, _, budget = text.partition(" @ ")
    assert str(parse(recipe)) == winner.recipe and (budget or None) == winner.budget
    with (tmp_path / "out" / tune.TRIALS).open() as file:
        table = list(csv.DictReader(file))
    assert [int(r["trial"]) for r in table] == [t.number for t in found] == list(range(8))
    assert {r["key"] for r in table} == {t.row.key for t in found if t.row}


def test_a_search_goes_on_where_it_was_and_measures_no_candidate_twice(tmp_path: Path) -> None:
    what, folder = search(tmp_path), tmp_path / "out"
    told: list[int] = []

    def stop_at_the_third(trial: tune.Trial) -> None:
        told.append(trial.number)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.run(what, folder, 6, told=stop_at_the_third)
    # one that was killed in the middle: asked, never told
    study = tune._study(what, folder, 0)
    tune._candidate(what, study.ask())
    found = tune.run(what, folder, 6)
    assert len(found) == 6 and [t.number for t in found[:3]] == told
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == len({t.row.key for t in found if t.row})
    assert tune.run(what, folder, 6) == found


def test_nothing_wins_if_nothing_is_allowed(tmp_path: Path) -> None:
    found = tune.run(search(tmp_path, limit="-1.0"), tmp_path / "out", 2)
    assert tune.best(found) is None and not (tmp_path / "out" / tune.BEST).exists()


def test_candidates_that_cannot_be_measured_are_in_the_table(tmp_path: Path) -> None:
    what = search(tmp_path, **{'"int8", "int4", "int2"]': '"int9"]', "[[space]]\nrecipe = \"str": "[[space]]\nrecipe = \"str"})  # fmt: skip
    found = tune.run(Search(**{**vars(what), "spaces": what.spaces[:1]}), tmp_path / "out", 1)
    assert found[0].row is None and "int9" in (found[0].failed or "")


def test_another_search_is_kept_out_of_a_folder(tmp_path: Path) -> None:
    tune.run(search(tmp_path), tmp_path / "out", 1)
    with pytest.raises(ValueError, match="holds another search"):
        tune.run(search(tmp_path, limit="0.25"), tmp_path / "out", 2)


def test_trials_of_another_text_are_not_taken_for_ours(tmp_path: Path) -> None:
    what = search(tmp_path)
    tune.run(what, tmp_path / "out", 1)
    words = tmp_path / "words.txt"
    words.write_text(words.read_text().replace("threads", "needles"))
    with pytest.raises(ValueError, match="measured on another text"):
        tune.run(what, tmp_path / "out", 2)


def test_a_trial_killed_before_it_was_told_is_told_once(tmp_path: Path) -> None:
    what, folder = search(tmp_path), tmp_path / "out"
    tell = tune._tell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "_tell", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune.run(what, folder, 1)
    assert tune._tell is tell
    found = tune.run(what, folder, 1)
    assert len(found) == 1 and found[0].row is not None
    assert len((folder / "results.jsonl").read_text().splitlines()) == 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_goals(tmp_path: Path) -> None:
    row = tune.run(search(tmp_path), tmp_path / "out", 1)[0].row
    assert row is not None and row.bytes.ratio is not None
    quality = search(tmp_path, limit="0.3", **{'"bytes"': '"quality"'})
    assert quality.objective(row) == row.quality.kl
    assert quality.violation(row) == pytest.approx(1 / row.bytes.ratio - 0.3)
    first = search(tmp_path, limit="0.9", **{'"kl"': '"top1"'})
    assert first.violation(row) == pytest.approx(0.9 - row.quality.top1)
    published = search(tmp_path, **{'"bytes"': '"published"', '"kl"': '"top1"'})
    # quality x ln(ratio + 1), from the published script
    from math import log

    assert published.objective(row) == pytest.approx(-row.quality.top1 * log(row.bytes.ratio + 1))
    assert published.violation(row) == 0


def test_templates_are_filled() -> None:
    space = Space("h2o(recent={r}) | {f}", "{share}%", {"r": [0.5], "f": ["int4"], "share": (1, 9)})
    assert space.filled({"r": 0.5, "f": "int4", "share": 7}) == ("h2o(recent=0.5) | int4", "7%")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"bytes"', '"speed"', "goal 'speed': one of"),
        ('"kl"', '"sharpness"', "metric 'sharpness'"),
        ('"kl"', '"evicted"', "neither more nor less"),
        ("limit = 0.5", "", "needs a limit"),
        ("low = 1", "least = 1", "a list of choices"),
        ("tokens = 80", "tokens = '80'", "not of type int"),
        ("sinks = {", "sinkz = {", "it has no {sinkz}"),
        ("tokens = 80", "tokns = 80", "[cell] has no 'tokns'; did you mean 'tokens'"),
        ("tokens = 80", 'kind = "manifold"', "document or task"),
        ('"kl"', '"score"', "as asked for do not measure it"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        search(tmp_path, **{old: new})
    assert words in str(error.value) and "search.toml" in str(error.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_presets_can_be_read_and_every_choice_is_a_recipe(path: Path, quick: bool) -> None:
    for space in read(path, quick).spaces:
        drawn = {n: given[0] for n, given in space.parameters.items()}
        for name, given in space.parameters.items():
            for choice in given:
                recipe, _ = space.filled(drawn | {name: choice})
                assert str(parse(recipe))

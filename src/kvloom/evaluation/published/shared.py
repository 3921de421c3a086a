"""What the published commands share: an experiment from flags, its run, and files from its rows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvloom.evaluation import experiment as records
from kvloom.evaluation import experiment_file, runner
from kvloom.evaluation.cells import Fallback
from kvloom.evaluation.experiment import Experiment, Figure, Outcome, Spec
from kvloom.evaluation.metrics import value
from kvloom.evaluation.report import kinds, style
from kvloom.evaluation.report.blocks import Picture
from kvloom.evaluation.report.data import Data

ROWS = "rows"  # folder of record and rows, beside the published files
QUICK = "the bundled model and texts, in minutes; what other flags say stays"
DATASETS = {  # published names -> texts
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "pg19": "emozilla/pg19-test",
}


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """An argument parser with `--quick`; a flag is what it was published as, or refused."""
    made = argparse.ArgumentParser(prog=name, description=about, allow_abbrev=False)
    made.add_argument("--quick", action="store_true", help=QUICK)
    return made


def chosen(given: argparse.Namespace, published: dict[str, Any], quick: dict[str, Any]) -> None:
    """Fill what was not given (None): as published, or with `--quick` of the quick version."""
    for name, at in (published | (quick if given.quick else {})).items():
        if getattr(given, name) is None:
            setattr(given, name, at)


def variable(name: str, default: Any = None) -> Any:
    """A variable of the environment (or of `.env`); of a number's kind if the default is one."""
    found = os.environ.get(name)
    if not found:
        return default
    if not isinstance(default, int):
        return found
    if not found.isdecimal() or int(found) < 1:
        raise ValueError(f"{name}={found!r}: it must be a whole number of at least 1")
    return int(found)


def dataset(name: str, config: str | None = None, split: str | None = None) -> str:
    """A text by its published name, or by any name that `kvloom compare --text` takes."""
    if Path(name).exists() or ("/" not in name and name not in DATASETS):
        return name
    known = DATASETS.get(name, name)
    parts = known.split(":") + [""] * 3
    parts[1], parts[2] = config or parts[1], split or parts[2]
    return ":".join(parts[:3]).rstrip(":")


def source(name: str) -> Path:
    """A file of `experiments/`. Raises ValueError outside of a checkout."""
    for folder in (Path(__file__).parents[4], Path.cwd()):
        path = folder / "experiments" / f"{name}.toml"
        if path.exists():
            return path
    raise ValueError(f"experiments/{name}.toml: not found; run this from a checkout of kvloom")


def written(
    path: Path, title: str, defaults: dict[str, Any], grids: Sequence[dict[str, Any]]
) -> tuple[Experiment, list[Fallback]]:
    """Write an experiment file, which `kvloom run` takes too, and read it."""
    lines = [f"title = {json.dumps(title)}", "", "[defaults]", *_fields(defaults)]
    for grid in grids:
        lines += ["", "[[grid]]", *_fields(grid)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return experiment_file.read(path)


def _fields(given: dict[str, Any]) -> list[str]:
    """TOML shares its texts, numbers, booleans and lists with JSON."""
    return [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in given.items()]


class _Lines(runner.Watcher):
    """A line per measured cell, on standard error."""

    def finished(self, outcome: Outcome, fresh: bool, left: int) -> None:
        if fresh or outcome.failed:
            what = f"failed: {outcome.failed}" if outcome.failed else "done"
            print(
                f"{outcome.spec.grid}: {outcome.spec.label}: {what}; {left} left", file=sys.stderr
            )


def measure(
    experiment: Experiment, fallbacks: list[Fallback], folder: Path, again: bool = False
) -> Experiment:
    """Run what has no row yet; rows and record lie in `folder`."""
    return runner.run(experiment, fallbacks, folder, watcher=_Lines(), again=again)


def changed(experiment: Experiment, change: Callable[[Spec], Spec]) -> None:
    """Replace every cell by what `change` makes of it."""
    for outcome in experiment.outcomes:
        outcome.spec = change(outcome.spec)


def with_options(spec: Spec, **options: Any) -> Spec:
    """A cell with some of its kind's options replaced."""
    known = {k: v for k, v in options.items() if k in spec.options}
    return dataclasses.replace(spec, options=spec.options | known)


def load(folder: Path) -> Experiment:
    """The record of a command that ran. Raises ValueError if it did not."""
    if not (folder / records.NAME).exists():
        raise ValueError(f"{folder} holds no {records.NAME}: run the experiment first")
    return records.load(folder)


def save(path: Path, content: Any) -> Path:
    """Write JSON; numbers that are not finite as text, as in rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def _plain(given: Any) -> Any:
    if isinstance(given, dict):
        return {str(k): _plain(v) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return [_plain(v) for v in given]
    if isinstance(given, Path):
        return str(given)
    return str(given) if isinstance(given, float) and not math.isfinite(given) else given


def facts(outcome: Outcome) -> dict[str, Any]:
    """Where a published number comes from: recipe, data, and the row's key."""
    spec = outcome.spec
    return {
        "recipe": spec.recipe, "budget": spec.budget, "model": spec.model,
        "data": "synthetic" if spec.synthetic else "real", "on": spec.task or spec.text,
        "row": outcome.key, **({"failed": outcome.failed} if outcome.failed else {}),
    }  # fmt: skip


def of(outcome: Outcome, metric: str) -> float | None:
    """A metric of an outcome's row; None without row or metric."""
    return None if outcome.row is None else value(outcome.row, metric)


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that were measured."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def draw(
    experiment: Experiment, rows: Path, figure: Figure, folder: Path, names: dict[str, str]
) -> list[Path]:
    """Pictures of a kind of figure, under published names.

    Args:
        names: the picture's own name (`""` if it is the only one) -> stem of its file; others are not drawn.
    """
    try:
        blocks = kinds.check(figure).make(Data.of(experiment, figure, rows))
    except ValueError as error:  # rows that are missing, or of which this kind makes nothing
        print(f"not drawn: {', '.join(names.values())}: {error}")
        return []
    made = []
    for block in blocks:
        if isinstance(block, Picture) and block.name in names:
            folder.mkdir(parents=True, exist_ok=True)
            made += style.save(block.figure, folder, names[block.name], ("png",))
    for path in made:
        print(f"wrote {path}")
    return made

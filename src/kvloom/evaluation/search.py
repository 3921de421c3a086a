"""What `kvloom tune` searches: a space of recipes, a goal, and how a candidate is measured.

title = "int4 and less"
goal = "bytes"                     # the smallest cache with change <= 0.01; or "quality", "published"
metric = "change"                  # of evaluation.metrics
limit = 0.01                       # of the metric; with goal = "quality": of the bytes retained
[cell]                             # as a grid of an experiment has it
tokens = 1025
[quick]                            # replaces some of it with --quick
tokens = 513
[[space]]                          # one of these is chosen first
recipe = "streaming_kvquant(chunk={chunk}, decay={decay})"
chunk = [256, 512, 1024]           # one of a list
decay = { low = 0.85, high = 0.99 }
[[space]]
recipe = "{scorer} | int4"
budget = "{share}%"
scorer = ["snapkv", "h2o"]
share = { low = 10, high = 60 }    # whole numbers: an integer
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.evaluation.experiment import Spec
from kvloom.evaluation.experiment_file import OPTIONS, SHARED, check_shared, known, options_of
from kvloom.evaluation.metrics import METRICS, OF_TASKS, AnyRow
from kvloom.evaluation.metrics import value as metric_of
from kvloom.evaluation.settings import filled

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GOALS = ("bytes", "quality", "published")
_TOP = {"title", "goal", "metric", "limit", "cell", "quick", "space"}
DIGITS = 4  # of a drawn number, so that a recipe stays readable


@dataclass(frozen=True)
class Space:
    """A template of recipes and budgets, and what its names stand for: choices, or `(low, high)`."""

    recipe: str
    budget: str | None
    parameters: dict[str, list[Any] | tuple[float, float]]

    def filled(self, drawn: dict[str, Any]) -> tuple[str, str | None]:
        """Recipe and budget for drawn parameters."""
        recipe, budget = self.recipe, self.budget
        for name, value in drawn.items():
            text = value if isinstance(value, str) else repr(value)
            recipe = recipe.replace(f"{{{name}}}", text)
            budget = None if budget is None else budget.replace(f"{{{name}}}", text)
        return recipe, budget


@dataclass(frozen=True)
class Search:
    """A file as above. `cell` is the spec of every candidate, its recipe left open."""

    title: str
    goal: str
    metric: str
    limit: float
    cell: Spec
    spaces: list[Space]

    def objective(self, row: AnyRow) -> float:
        """What is made small: bytes retained, the metric, or minus the published objective."""
        if self.goal == "bytes":
            return _needed(row, "retained")
        if self.goal == "published":
            return -metric_of_published(row, self.metric)
        sign = -1 if METRICS[self.metric].better == "higher" else 1
        return sign * _needed(row, self.metric)

    def violation(self, row: AnyRow) -> float:
        """How far a candidate is from what is allowed; at most 0: allowed."""
        if self.goal == "published":
            return 0.0
        if self.goal == "quality":
            return _needed(row, "retained") - self.limit
        sign = -1 if METRICS[self.metric].better == "higher" else 1
        return sign * (_needed(row, self.metric) - self.limit)


def metric_of_published(row: AnyRow, metric: str) -> float:
    """The objective of the published tuning: quality x log(compression ratio + 1), natural log."""
    return _needed(row, metric) * math.log(_needed(row, "ratio") + 1)


def _needed(row: AnyRow, metric: str) -> float:
    value = metric_of(row, metric)
    if value is None:
        raise ValueError(f"metric {metric!r}: this kind of cell does not measure it")
    return value


def read(path: Path, quick: bool = False, model: str | None = None) -> Search:
    """The search of a file. Raises ValueError, naming the file, on anything that is not as above."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        return _search(filled(given), quick, model)
    except OSError as error:
        raise ValueError(f"search {str(path)!r} cannot be read: {error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"search {str(path)!r}: {error}") from None


def _search(given: dict[str, Any], quick: bool, model: str | None) -> Search:
    known(given, _TOP, "the file")
    goal, metric, limit = given.get("goal"), given.get("metric"), given.get("limit", 0.0)
    if goal not in GOALS:
        raise ValueError(f"goal {goal!r}: one of {', '.join(GOALS)}")
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: one of {', '.join(METRICS)}")
    if goal != "published" and "limit" not in given:
        raise ValueError(f"goal {goal!r} needs a limit")
    if not METRICS[metric].better:
        raise ValueError(f"metric {metric!r}: neither more nor less of it is better")
    for part in ("cell", "quick"):
        every = {"kind", *SHARED} | {name for own in OPTIONS.values() for name in own}
        known(given.get(part, {}), every, f"[{part}]")
    spaces = [_space(s) for s in given.get("space", [])]
    if not spaces:
        raise ValueError("no space to search")
    cell = given.get("cell", {}) | (given.get("quick", {}) if quick else {})
    if model:
        cell["model"] = model
    spec = _cell(cell)
    measured = metric in OF_TASKS if spec.kind == "task" else True
    if not measured or (
        metric == "score" and spec.kind == "document" and not spec.options["needles"]
    ):
        raise ValueError(
            f"metric {metric!r}: cells of kind {spec.kind!r} as asked for do not measure it"
        )
    return Search(given.get("title", ""), goal, metric, float(limit), spec, spaces)


def _cell(given: dict[str, Any]) -> Spec:
    kind = given.get("kind", "document")
    if kind not in ("document", "task"):
        raise ValueError(f"[cell]: kind {kind!r}: document or task")
    check_shared(given, "[cell]", several=())
    options = options_of(given, kind, "cell")
    made = SHARED | {k: v for k, v in given.items() if k in SHARED}
    return Spec(
        grid="tune", phase=None, kind=kind, recipe="none", budget=None, model=made["model"],
        dtype=made["dtype"], device=made["device"], threads=made["threads"] or None,
        text=made["text"] if kind == "document" else None,
        task=made["task"] if kind == "task" else None, seed=made["seed"],
        synthetic=made["synthetic"], options=options,
    )  # fmt: skip


def _space(given: dict[str, Any]) -> Space:
    own = dict(given)
    recipe, budget = own.pop("recipe"), own.pop("budget", None)
    for name in own:
        if f"{{{name}}}" not in recipe + (budget or ""):
            raise ValueError(f"space {recipe!r}: it has no {{{name}}}")
    return Space(recipe, budget, {name: _range(name, value) for name, value in own.items()})


def _range(name: str, value: Any) -> list[Any] | tuple[float, float]:
    if isinstance(value, list) and value:
        return value
    if isinstance(value, dict) and set(value) == {"low", "high"} and value["low"] < value["high"]:
        return (value["low"], value["high"])
    raise ValueError(f"{name} = {value!r}: a list of choices, or {{ low = ..., high = ... }}")

"""What a kind of figure is given: the cells of its grid, repeats together, and its options."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.core.recipe import Recipe
from kvloom.evaluation import subjects
from kvloom.evaluation.analysis_cells import folder_of
from kvloom.evaluation.cells import changed
from kvloom.evaluation.experiment import Claim, Experiment, Figure, Outcome, Spec
from kvloom.evaluation.metrics import AnyRow, value
from kvloom.evaluation.statistics import Summary, summary
from kvloom.evaluation.task_results import TaskRow

MARK = "*"  # before the name of what ran otherwise than asked
MARKED = (
    f"{MARK} ran otherwise than asked, since memory ran out: it is shown by itself, with what was changed, and no mean "
    "holds it together with others."
)
REPEATS = frozenset({"seed", "repeat"})
# What cells may differ in, besides recipe and budget; the order is that of a table's columns.
FACETS = ("model", "dtype", "device", "threads", "text", "task", "synthetic", "grid")


ANALYSES = ("manifold", "attention")  # kinds of cells whose results are folders, not rows


class Missing(ValueError):
    """The rows that a figure needs are not there; the page says so in its place."""


def called(spec: Spec) -> str:
    """What figures call a recipe: its name if it has one, else its text without the repeat's seed."""
    return spec.name or unseeded(spec.recipe, spec.seed)


def ran(outcome: Outcome) -> Spec:
    """A cell as it was measured: with what its fallback changed."""
    return changed(outcome.spec, outcome.fallback) if outcome.key else outcome.spec


def changes(outcome: Outcome) -> str:
    """How a cell ran otherwise than asked, e.g. `"prefill_chunk 256"`; empty if it ran as asked."""
    asked, own = _flat(outcome.spec), _flat(ran(outcome))
    own["model"] = (
        Path(str(own["model"])).name if own["model"] != asked["model"] else asked["model"]
    )
    return ", ".join(f"{k} {v}" for k, v in own.items() if v != asked.get(k))


def _flat(spec: Spec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    return fields | fields.pop("options")


def named(outcome: Outcome) -> str:
    """What figures call what ran: the recipe, marked and with the changes if it ran otherwise than asked."""
    other = changes(outcome)
    return f"{MARK}{called(outcome.spec)} ({other})" if other else called(outcome.spec)


def claimed(experiment: Experiment, outcome: Outcome) -> list[Claim]:
    """What was published about a cell; nothing if it ran with another model than was asked for."""
    same = ran(outcome).model == outcome.spec.model
    return experiment.claims_of(outcome) if same else []


def unseeded(text: str, seed: int) -> str:
    """A recipe or task without `seed=...`, where that is the repeat's."""
    text = re.sub(rf"(,\s*)?\bseed={seed}\b", "", text)
    return re.sub(r"\(,\s*", "(", text).replace("()", "")


def _identity(outcome: Outcome) -> dict[str, Any]:
    """What tells cells apart, of what ran: repeats may differ in the seed that stands in a recipe or task;
    what a fallback changed always tells apart.
    """
    spec = ran(outcome)
    fields = dataclasses.asdict(spec) | {"changes": changes(outcome)}
    task = None if spec.task is None else unseeded(spec.task, spec.seed)
    return fields | {"recipe": unseeded(spec.recipe, spec.seed), "task": task}


@dataclass(frozen=True)
class Cell:
    """Outcomes that are repeats of each other; `spec`: of the first one, as it ran, standing for all."""

    spec: Spec
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """What figures call it, see `named`."""
        return named(self.outcomes[0]) if self.outcomes else called(self.spec)

    @property
    def changes(self) -> str:
        """See `changes`."""
        return changes(self.outcomes[0]) if self.outcomes else ""

    @property
    def rows(self) -> list[AnyRow]:
        return [o.row for o in self.outcomes if o.row is not None]

    @property
    def failure(self) -> str:
        """Why there are no rows; empty if there are."""
        if self.rows:
            return ""
        said = [o.failed for o in self.outcomes if o.failed]
        return f"failed: {said[0]}" if said else "not measured"

    def with_metric(self, name: str) -> list[AnyRow]:
        """The rows that have a metric."""
        return [row for row in self.rows if value(row, name) is not None]

    def keys(self, name: str) -> tuple[str, ...]:
        """Of the rows that a metric's mean comes from."""
        return tuple(row.key for row in self.with_metric(name))

    def values(self, name: str) -> list[float]:
        """A metric of each row that has it."""
        return [v for row in self.rows if (v := value(row, name)) is not None]

    def summary(self, name: str) -> Summary | None:
        """Over the repeats. The interval of a task's score is over all examples, where each repeat has as
        many of them; so a single repeat has an interval, too.
        """
        rows, values = self.with_metric(name), self.values(name)
        if not values:
            return None
        over_repeats = summary(values)
        counts = {len(r.answers) for r in rows if isinstance(r, TaskRow)}
        pooled = [a.score for r in rows if isinstance(r, TaskRow) for a in r.answers]
        if name != "score" or len(counts) != 1 or len(pooled) != counts.pop() * len(rows):
            return over_repeats
        over_examples = summary(pooled)
        return dataclasses.replace(over_repeats, low=over_examples.low, high=over_examples.high)


@dataclass(frozen=True)
class Data:
    """One figure of an experiment. `outcomes`: of its grid; `folder`: where the record lies."""

    experiment: Experiment
    figure: Figure
    folder: Path
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, experiment: Experiment, figure: Figure, folder: Path) -> Data:
        held: dict[tuple[str, str], Outcome] = {}
        for i, o in enumerate(experiment.grid(figure.grid)):
            if o.spec.kind not in ANALYSES:
                # several grids may ask for the same cell: its row is one measurement and counts once
                held.setdefault((o.key or f"none {i}", named(o)), o)
        return cls(experiment, figure, folder, tuple(held.values()))

    def analyses(self, kind: str) -> list[Path]:
        """Folders of finished analyses of a kind: of the grid's cells, or whatever lies below the folder.

        Raises Missing if there is none.
        """
        cells = [o for o in self.experiment.grid(self.figure.grid) if o.spec.kind == kind]
        kept = [folder_of(self.folder, kind, o.key) for o in cells if o.key]
        found = [path for path in dict.fromkeys(kept) if path.is_dir()]
        if not cells:
            found = sorted(path.parent for path in self.folder.rglob(f"{kind}.jsonl"))
        if not found:
            raise Missing(f"{self.folder.name!r} holds no results of `kvloom analyze {kind}`")
        return found

    def option(self, name: str, default: Any) -> Any:
        return self.figure.options.get(name, default)

    def names(self, name: str, default: Sequence[str]) -> list[str]:
        """An option that is a name or several. Raises ValueError if it is anything else."""
        found = self.option(name, list(default))
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
            raise ValueError(f"option {name} is {found!r}: give a name or a list of names")
        return found

    def cells(self, fold: Iterable[str] = ()) -> list[Cell]:
        """Cells, repeats together; `fold`: what else of `Spec` does not tell cells apart, for means over
        texts or tasks. Raises ValueError if there is no such field, Missing if there are no cells.
        """
        folded = REPEATS | set(fold)
        unknown = folded - {f.name for f in dataclasses.fields(Spec)}
        if unknown:
            raise ValueError(f"option fold: {', '.join(sorted(unknown))} tells no cells apart")
        if not self.outcomes:
            raise Missing(f"grid {self.figure.grid!r} has no cells" if self.figure.grid else "there are no cells")  # fmt: skip
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            fields = {k: v for k, v in _identity(outcome).items() if k not in folded}
            found.setdefault(json.dumps(fields, sort_keys=True, default=str), []).append(outcome)
        return [Cell(ran(held[0]), tuple(held)) for held in found.values()]

    def subjects(self, apart: str = "") -> list[Cell]:
        """Cells by recipe, budget and model alone: means over texts, tasks and seeds; and by the options,
        if `apart` is one of them.
        """
        fold = ["text", "task", "kind", "synthetic", "phase", "grid"]
        optional = any(apart in o.spec.options for o in self.outcomes)
        return self.cells(fold if optional else [*fold, "options"])

    @property
    def recipes(self) -> list[str]:
        """Names of all recipes of the experiment in order, so that each looks the same in every figure."""
        asked = [called(o.spec) for o in self.experiment.outcomes]
        return list(dict.fromkeys([*asked, *map(named, self.experiment.outcomes)]))

    def by_model(self) -> list[Data]:
        """One for each model and dtype that ran."""
        found: dict[tuple[str, str], list[Outcome]] = {}
        for o in self.outcomes:
            spec = ran(o)
            found.setdefault((spec.model, spec.dtype), []).append(o)
        if len(found) < 2:
            return [self]
        return [
            dataclasses.replace(
                self,
                outcomes=tuple(held),
                figure=dataclasses.replace(
                    self.figure, title=f"{self.figure.title} ({Path(model).name}, {dtype})"
                ),
            )
            for (model, dtype), held in found.items()
        ]

    def claims(self, cell: Cell) -> list[Claim]:
        """What was published about a cell, see `claimed`."""
        return list(dict.fromkeys(c for o in cell.outcomes for c in claimed(self.experiment, o)))


def varying(cells: Sequence[Cell]) -> list[str]:
    """Facets and options in which cells differ, besides recipe and budget."""
    facets = [f for f in FACETS if len({facet(c.spec, f) for c in cells}) > 1]
    options = sorted({name for c in cells for name in c.spec.options})
    seen = {name: {repr(c.spec.options.get(name)) for c in cells} for name in options}
    return facets + [f"options.{name}" for name in options if len(seen[name]) > 1]


def facet(spec: Spec, name: str) -> str:
    """One of `varying`, as text."""
    if name.startswith("options."):
        found = spec.options.get(name.removeprefix("options."))
    else:
        found = getattr(spec, name)
        if name == "task" and found:
            return unseeded(str(found), spec.seed)
        if name == "synthetic":
            return "synthetic" if found else "real"
        if name == "model":
            return Path(str(found)).name
    return "" if found is None else str(found)


def parameters(spec: Spec) -> dict[str, Any]:
    """Every parameter of a recipe, as `"policy.name"`, the default schedule of what evicts included; of a
    recipe that cannot be read here, none.
    """
    try:
        subject = subjects.parse(spec.recipe)
    except ValueError:  # of a method that is not installed here
        return {}
    if not isinstance(subject, Recipe):
        return {f"recompute.{k}": v for k, v in dataclasses.asdict(subject).items()}
    schedule = [subject.schedule] if subject.evicts else []
    chain = {p.name: p for p in (*subject.policies, *schedule)}
    return {
        f"{n}.{f.name}": getattr(p, f.name) for n, p in chain.items() for f in dataclasses.fields(p)
    }


def parameter(spec: Spec, name: str) -> Any:
    """A recipe's parameter: `"every"`, or `"lazy.every"` where several policies have one of that name; or an
    option of the cell, or `"budget"`. None if the recipe has none of that name.

    Raises ValueError if the name is ambiguous.
    """
    if name == "budget":
        return spec.budget
    if name in spec.options:
        return spec.options[name]
    known = parameters(spec)
    found = full_names(known, name)
    if len(found) > 1:
        raise ValueError(f"parameter {name!r} of {spec.recipe!r}: which one, {', '.join(found)}?")
    return known[found[0]] if found else None


def full_names(known: Iterable[str], name: str) -> list[str]:
    """Which of `known` a name can mean."""
    return [k for k in known if name == k or ("." not in name and k.endswith(f".{name}"))]


def series(cells: Sequence[Cell], swept: Sequence[str]) -> list[str]:
    """Of each cell, in what it differs from others besides the parameters that are swept over, as text;
    cells of the same text belong to one line.
    """
    own: list[dict[str, str]] = []
    for cell in cells:
        known = parameters(cell.spec)
        gone = {k for name in swept for k in full_names(known, name)}
        left = {k: repr(v) for k, v in known.items() if k not in gone}
        asked = cell.outcomes[0].spec if cell.outcomes else cell.spec
        left |= {
            "budget": cell.spec.budget or "none",
            f"{MARK}ran with": cell.changes,
            **{k: str(v) for k, v in asked.options.items()},
        }
        own.append(
            {k: v for k, v in left.items() if k not in swept} | {"": "" if gone else cell.name}
        )
    names = sorted({k for left in own for k in left})
    varied = [k for k in names if len({left.get(k) for left in own}) > 1]
    if len({frozenset(k.split(".")[0] for k in left) for left in own}) > 1:  # of several methods
        return [
            cell.name if left[""] else _without(cell.name, swept)
            for cell, left in zip(cells, own, strict=True)
        ]
    return [
        ", ".join(f"{k.split('.')[-1]} {left[k]}" if k else left[k] for k in varied if left.get(k))
        for left in own
    ]


def _without(name: str, swept: Sequence[str]) -> str:
    """A recipe's text without some parameters."""
    for parameter in swept:
        own = parameter.split(".")[-1]
        name = re.sub(rf"(,\s*)?\b{own}=(\([^)]*\)|[^,()]+)", "", name)
    return re.sub(r"\(,\s*", "(", name).replace("()", "")

"""An experiment's record: which cells it has, which rows they have, what was claimed, what to draw.

`FOLDER/experiment.json` is the record, `FOLDER/results.jsonl` holds the rows. The record is replaced as
a whole whenever a cell is finished; the runner finds a row that it does not name yet by its key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.metrics import METRICS, AnyRow

SCHEMA = "kvloom.experiment"
VERSION = 1
NAME = "experiment.json"


@dataclass
class Spec:
    """One cell as its experiment asks for it: plain text and numbers, nothing loaded.

    Attributes:
        grid: name of the grid that it is of. phase: of the grid, if it says. kind: `"document"`, `"task"`,
            `"manifold"` or `"attention"`. recipe, budget: as text; budget None: none. model, dtype, device,
            threads: what runs it. text or task: what it runs on. seed: of the repeat; repeat: from 0.
        options: the kind's other settings (`tokens`, `prefill`, `view`, ...).
        synthetic: whether the data is made up, as published tables have to say.
        name: what tables call the recipe, if not by its text.
    """

    grid: str
    phase: int | None
    kind: str
    recipe: str
    budget: str | None
    model: str
    dtype: str
    device: str
    threads: int | None
    text: str | None = None
    task: str | None = None
    seed: int = 0
    repeat: int = 0
    synthetic: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """For progress and tables."""
        at = f" @ {self.budget}" if self.budget else ""
        return f"{self.name or self.recipe}{at}"


@dataclass
class Outcome:
    """A cell and what came of it.

    Attributes:
        key: of its row; None: not measured. failed: why there is none, e.g. `"out of memory"`. fallback:
            what was changed so that it ran, e.g. `{"prefill_chunk": 512}`.
        row: the row, once it is loaded; not part of the record.
    """

    spec: Spec
    key: str | None = None
    failed: str | None = None
    fallback: dict[str, Any] | None = None
    row: AnyRow | None = None


@dataclass(frozen=True)
class Claim:
    """A published figure, to stand beside ours.

    Attributes:
        grid, recipe, budget: the cells that measure the same; the recipe by its text or its name. metric: one of `METRICS`. value: as
            published, in the metric's unit. where: paper, table and model.
    """

    recipe: str
    metric: str
    value: float
    where: str
    grid: str | None = None
    budget: str | None = None


@dataclass(frozen=True)
class Figure:
    """A figure or table to make of a grid's rows; kinds and options are those of `report`."""

    kind: str
    title: str
    grid: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Experiment:
    """The record as a whole. `source` names the file it came from; `scale`: `"testbed"`, `"quick"` or
    `"paper"`, see `experiment_file`.
    """

    name: str
    title: str
    summary: str
    source: str
    scale: str
    outcomes: list[Outcome]
    claims: list[Claim] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def grid(self, name: str | None) -> list[Outcome]:
        """Outcomes of a grid; of all with None."""
        return [o for o in self.outcomes if name is None or o.spec.grid == name]

    def claims_of(self, outcome: Outcome) -> list[Claim]:
        """What was published about a cell."""
        spec = outcome.spec
        return [
            c
            for c in self.claims
            if c.recipe in (spec.name, spec.recipe)
            and c.grid in (None, spec.grid)
            and c.budget in (None, spec.budget)
        ]

    def save(self, folder: Path) -> None:
        """Write the record into a folder, at once or not at all."""
        fields = asdict(self)
        for outcome in fields["outcomes"]:
            del outcome["row"]
        text = json.dumps({"schema": SCHEMA, "version": VERSION, **fields}, indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{NAME}.{os.getpid()}"
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, folder / NAME)


def load(folder: Path) -> Experiment:
    """The record of a folder with its rows. Raises ValueError, naming the file, if there is none, or it
    has not the fields of a record.
    """
    path = folder / NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no experiment: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no record of an experiment, which is a JSON object")
    if fields.pop("schema", None) != SCHEMA or fields.pop("version", None) != VERSION:
        raise ValueError(f"{path} is no record of an experiment that this kvloom reads")
    rows = Ledger(folder).rows
    try:
        return _read(fields, rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        words = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no whole record of an experiment: {words}") from None


def _read(fields: dict[str, Any], rows: Mapping[str, AnyRow]) -> Experiment:
    outcomes = []
    for given in fields.pop("outcomes"):
        outcome = Outcome(**(given | {"spec": Spec(**given["spec"])}))
        outcome.row = rows.get(outcome.key) if outcome.key else None
        outcomes.append(outcome)
    claims = [Claim(**c) for c in fields.pop("claims")]
    figures = [Figure(**f) for f in fields.pop("figures")]
    for claim in claims:
        if claim.metric not in METRICS:
            raise ValueError(f"metric {claim.metric!r}: one of {', '.join(METRICS)}")
    return Experiment(**fields, outcomes=outcomes, claims=claims, figures=figures)

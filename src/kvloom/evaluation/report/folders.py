"""An experiment of a folder; of rows alone, as `kvloom compare` leaves them, one is made up around them."""

from __future__ import annotations

from pathlib import Path

from kvloom.evaluation import experiment, ledger, manifold, spectrum, token_map
from kvloom.evaluation.experiment import Experiment, Figure, Outcome, Spec
from kvloom.evaluation.metrics import AnyRow
from kvloom.evaluation.results import Row

DEFAULT = (
    ("table", "Bytes, quality and time"),
    ("pareto", "Quality against bytes"),
    ("needles", "Retrieval by length and depth"),
    ("efficiency", "Time and bytes beside a full cache"),
    ("steps", "Over the document"),
)


TITLES = {
    "manifold": "Keys before and after partition",
    "energy": "Attention to centroids",
    "tokens": "What became of each token",
}


def load(folder: Path) -> Experiment:
    """The record of a folder, or one around its rows. Raises ValueError if it holds neither."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder of results")
    if (folder / experiment.NAME).exists():
        return experiment.load(folder)
    if (folder / ledger.NAME).exists():
        return around(list(ledger.Ledger(folder).rows.values()), folder)
    if not analyses(folder):
        raise ValueError(f"{str(folder)!r} holds neither {experiment.NAME} nor {ledger.NAME}")
    return around([], folder)


def analyses(folder: Path) -> dict[str, str]:
    """Kinds of analyses that a folder holds, and the kind of figure that shows each."""
    kinds = {manifold.NAME: "manifold", spectrum.NAME: "energy", token_map.NAME: "tokens"}
    return {n: kind for n, kind in kinds.items() if next(folder.rglob(f"{n}.jsonl"), None)}


def with_analyses(made: Experiment, folder: Path) -> list[Figure]:
    """Figures of an experiment, and after them those of analyses that it did not ask for."""
    asked = {figure.kind for figure in made.figures}
    others = [kind for kind in analyses(folder).values() if kind not in asked]
    return [*made.figures, *(Figure(kind, TITLES[kind]) for kind in others)]


def around(rows: list[AnyRow], folder: Path) -> Experiment:
    """Rows as an experiment of one grid, with the figures that such rows usually allow."""
    outcomes = [Outcome(_spec(row), row.key, row=row) for row in rows]
    made = Experiment(
        folder.resolve().name,
        folder.resolve().name,
        "",
        f"the rows of {folder.resolve().name}",
        "testbed",
        outcomes,
    )
    made.figures = [Figure(kind, title) for kind, title in DEFAULT if kind in _useful(rows)]
    return made


def _useful(rows: list[AnyRow]) -> set[str]:
    tasks = any(not isinstance(r, Row) for r in rows)
    documents = any(isinstance(r, Row) for r in rows)
    found = {"table", "pareto"} if rows else set()
    return (
        found
        | ({"needles"} if tasks else set())
        | ({"efficiency", "steps"} if documents else set())
    )


def _spec(row: AnyRow) -> Spec:
    document = isinstance(row, Row)
    options = (
        {"tokens": row.protocol.tokens, "prefill": row.protocol.prefill}
        if isinstance(row, Row)
        else {}
    )
    return Spec(
        grid="rows",
        phase=None,
        kind="document" if document else "task",
        recipe=row.subject.recipe,
        budget=row.subject.budget,
        model=row.model.name,
        dtype=row.model.dtype,
        device=row.environment.device,
        threads=row.environment.threads,
        text=row.text.name if isinstance(row, Row) else None,
        task=None if isinstance(row, Row) else row.task.task,
        options=options,
    )

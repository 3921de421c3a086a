"""Experiments, run: cells go to an executor, rows to the ledger, and the record says which is whose.

A row is on the disk before the next one is awaited, so a kill loses the cells in flight and no more; the
same command goes on from there. A row is only used again if its key, a hash of everything that
determines it, is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvloom.evaluation.analysis_cells import Analyst
from kvloom.evaluation.cells import Fallback, Finished, with_fallbacks
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.executors import Order, executor
from kvloom.evaluation.experiment import NAME as RECORD
from kvloom.evaluation.experiment import Experiment, Outcome, Spec, load
from kvloom.evaluation.identity import source_sha256
from kvloom.evaluation.ledger import Ledger

MEASURED = ("document", "task")


class Watcher(Progress):
    """Told of what happens; does nothing. Subclasses show it."""

    def finished(self, outcome: Outcome, fresh: bool, left: int) -> None:
        """A cell has come to an end; `left` are still to do."""


def run(
    experiment: Experiment, fallbacks: list[Fallback], folder: Path, name: str = "inline",
    workers: int | None = None, watcher: Watcher | None = None, again: bool = False,
    keep: bool = False,
) -> Experiment:  # fmt: skip
    """Measure what is not measured yet, and return the experiment with its rows.

    Args:
        name: of the executor. again: measure even what is known. keep: leave what the folder's record says
            of other grids in it, as when only some phases are run.

    Raises ValueError on an unknown executor, and OSError if the folder cannot be written; cells that
    fail are in the record with their reason.
    """
    start = executor(name)
    ledger, watcher = Ledger(folder), watcher or Watcher()
    if again:
        ledger.rows.clear()
    outcomes = dict(enumerate(experiment.outcomes))
    _continue(experiment, folder, keep)
    experiment.save(folder)
    specs = {i: o.spec for i, o in outcomes.items() if o.spec.kind in MEASURED}
    order = Order(specs, fallbacks, ledger.rows, workers, watcher)
    left = len(outcomes)
    for number, done in _all(start(order), outcomes, fallbacks, Analyst(folder, again)):
        left -= 1
        outcome = outcomes[number]
        if done.row is not None:
            ledger.append(done.row)
        outcome.key, outcome.failed, outcome.fallback = done.key, done.failed, done.fallback
        outcome.row = ledger.get(done.key) if done.key else None
        experiment.save(folder)
        watcher.finished(outcome, done.row is not None, left)
    return experiment


def _continue(experiment: Experiment, folder: Path, keep: bool) -> None:
    """Take over what an earlier run's record says, until each cell is found or measured anew.

    Not what other sources of kvloom measured: were this run killed, its record would show both as one.
    """
    if not (folder / RECORD).exists():
        return
    grids = {o.spec.grid for o in experiment.outcomes}
    before = load(folder)
    said = {json.dumps(asdict(o.spec), sort_keys=True): o for o in before.outcomes}
    for outcome in experiment.outcomes:
        known = said.get(json.dumps(asdict(outcome.spec), sort_keys=True))
        if known is not None and _of_these_sources(known):
            outcome.key, outcome.failed, outcome.fallback = known.key, known.failed, known.fallback
            outcome.row = known.row
    if keep and before.scale == experiment.scale:
        experiment.outcomes += [o for o in before.outcomes if o.spec.grid not in grids]


def _of_these_sources(known: Outcome) -> bool:
    return known.row is None or known.row.environment.source_sha256 == source_sha256()


def _all(
    measured: Iterator[tuple[int, Finished]], outcomes: dict[int, Outcome],
    fallbacks: list[Fallback], analyst: Analyst,
) -> Iterator[tuple[int, Finished]]:  # fmt: skip
    """What executors measure, then analyses, which keep tensors beside their rows: here, one by one."""
    yield from measured
    for number, outcome in outcomes.items():
        if outcome.spec.kind not in MEASURED:
            yield number, with_fallbacks(outcome.spec, fallbacks, analyst.work)


def failures(experiment: Experiment) -> list[tuple[Spec, str]]:
    """Cells that have no row, and why."""
    return [(o.spec, o.failed) for o in experiment.outcomes if o.failed]


def summary(experiment: Experiment) -> dict[str, Any]:
    """How the cells of an experiment stand, as counts."""
    outcomes = experiment.outcomes
    return {
        "cells": len(outcomes),
        "measured": sum(o.key is not None for o in outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
        "fallbacks": sum(o.fallback is not None for o in outcomes),
    }

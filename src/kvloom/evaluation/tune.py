"""The search itself: optuna proposes, cells are measured like any other, the best allowed one wins.

`FOLDER/study.db` (SQLite) holds the trials, `FOLDER/results.jsonl` the rows, `FOLDER/trials.csv` both as a
table, `FOLDER/best.txt` the winning recipe. All of them are data: a killed search goes on from there, and a
candidate that was measured before is looked up.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.core.budget import Budget
from kvloom.evaluation.cells import Workplace
from kvloom.evaluation.experiment import Spec
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.metrics import METRICS, AnyRow, value
from kvloom.evaluation.search import DIGITS, Search, Space
from kvloom.evaluation.subjects import Cell, parse

STUDY, TRIALS, BEST = "study.db", "trials.csv", "best.txt"
RESULT = "result"  # of a trial, in the study
SHOWN = ("retained", "ratio", "score", "decode_perplexity", "change", "kl", "top1", "tpot")


@dataclass(frozen=True)
class Trial:
    """A candidate. `row` is None where it could not be measured: `failed` says why.

    Attributes:
        objective: what is made small. violation: at most 0 where the candidate is allowed.
    """

    number: int
    recipe: str
    budget: str | None
    row: AnyRow | None
    failed: str | None
    objective: float | None
    violation: float | None

    @property
    def allowed(self) -> bool:
        """Whether it may win."""
        return self.violation is not None and self.violation <= 0

    @property
    def text(self) -> str:
        """As `kvloom compare --recipe` takes it."""
        return self.recipe + (f" @ {self.budget}" if self.budget else "")


def optuna() -> Any:
    """The library. Raises ValueError if it is not installed."""
    try:
        found = importlib.import_module("optuna")
    except ImportError:
        raise ValueError("to search, pip install 'kvloom[tune]'") from None
    found.logging.set_verbosity(found.logging.WARNING)
    return found


def run(
    search: Search, folder: Path, trials: int, seed: int = 0,
    told: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:  # fmt: skip
    """Search until there are `trials` finished ones, those of earlier runs included; all of them.

    Raises ValueError if optuna is missing, or if the folder holds another search, or trials that were
    measured on another text or model, or by other versions.
    """
    study = _study(search, folder, seed)
    ledger, place = Ledger(folder), Workplace()
    _check_fresh(search, _trials(study, ledger), place, folder)
    _give_up_interrupted(study)
    while len(_finished(study)) < trials:
        asked = study.ask()
        spec = _candidate(search, asked)
        trial = _measured(search, spec, asked.number, ledger, place)
        if trial.violation is not None:
            asked.set_constraint("limit", trial.violation)
        asked.set_user_attr(
            RESULT, _spelled(trial)
        )  # at once: a killed search finds all of it, or nothing
        _tell(study, asked.number, trial.objective)
        write(_trials(study, ledger), folder)
        told(trial)
    found = _trials(study, ledger)
    write(found, folder)
    return found


def best(trials: list[Trial]) -> Trial | None:
    """The allowed candidate with the least objective; the first of equals."""
    allowed = [t for t in trials if t.allowed and t.objective is not None]
    return min(allowed, key=lambda t: (t.objective, t.number), default=None)


def write(trials: list[Trial], folder: Path) -> None:
    """The table of trials, and the winner as text, if one is allowed."""
    part = folder / f".{TRIALS}.{os.getpid()}"
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", "recipe", "budget", "objective", "allowed", *SHOWN, "failed", "key"]
        )
        for t in trials:
            figures = [None if t.row is None else value(t.row, name) for name in SHOWN]
            key = None if t.row is None else t.row.key
            writer.writerow(
                [t.number, t.recipe, t.budget, t.objective, t.allowed, *figures, t.failed, key]
            )
    os.replace(part, folder / TRIALS)
    winner = best(trials)
    if winner is not None:
        part.write_text(winner.text + "\n", encoding="utf-8")
        os.replace(part, folder / BEST)


def _study(search: Search, folder: Path, seed: int) -> Any:
    """The study of a folder; what it searches is kept with it, so that no other goes on in it."""
    library = optuna()
    folder.mkdir(parents=True, exist_ok=True)
    described = repr(dataclasses.replace(search, title=""))
    storage = f"sqlite:///{(folder / STUDY).resolve()}"
    study = library.create_study(study_name="kvloom", storage=storage, load_if_exists=True)
    if study.user_attrs.setdefault("search", described) != described:
        raise ValueError(f"{str(folder)!r} holds another search; choose another folder")
    study.set_user_attr("search", described)
    study.sampler = library.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _tell(study: Any, number: int, objective: float | None) -> None:
    if objective is None:
        study.tell(number, state=optuna().trial.TrialState.FAIL)
    else:
        study.tell(number, objective)


def _give_up_interrupted(study: Any) -> None:
    """A trial that a killed run left open is closed: with its result if it has one, else to be proposed
    again.
    """
    states = optuna().trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        result = json.loads(trial.user_attrs.get(RESULT, "{}"))
        _tell(study, trial.number, result.get("objective"))
        if not result and trial.params:
            study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def _finished(study: Any) -> list[Any]:
    """Trials that were measured or could not be: not those that were interrupted."""
    return [t for t in study.get_trials() if RESULT in t.user_attrs and t.state.is_finished()]


def _check_fresh(search: Search, trials: list[Trial], place: Workplace, folder: Path) -> None:
    """Raise ValueError if what was measured has another key now."""
    for trial in trials:
        if trial.row is None:
            continue
        spec = dataclasses.replace(search.cell, recipe=trial.recipe, budget=trial.budget)
        if place.key(spec) != trial.row.key:
            raise ValueError(
                f"{str(folder)!r} holds trials that were measured on another text or model, or by other "
                "versions of kvloom, torch or transformers, or on another machine: they cannot be "
                "compared with new ones; choose another folder"
            )
        return


def _spelled(trial: Trial) -> str:
    """A trial as text; its row by its key."""
    fields = {f.name: getattr(trial, f.name) for f in dataclasses.fields(trial)}
    return json.dumps(fields | {"row": None if trial.row is None else trial.row.key})


def _candidate(search: Search, trial: Any) -> Spec:
    """Draw a space, then its parameters."""
    spaces = [s.recipe for s in search.spaces]
    chosen = 0
    if len(spaces) > 1:
        chosen = trial.suggest_categorical("space", list(range(len(spaces))))
    space = search.spaces[chosen]
    recipe, budget = space.filled(_drawn(space, chosen, trial))
    return dataclasses.replace(search.cell, recipe=recipe, budget=budget)


def _drawn(space: Space, chosen: int, trial: Any) -> dict[str, Any]:
    drawn: dict[str, Any] = {}
    for name, given in space.parameters.items():
        key = f"{chosen}.{name}"
        if isinstance(given, list):
            drawn[name] = trial.suggest_categorical(key, given)
        elif isinstance(given[0], int) and isinstance(given[1], int):
            drawn[name] = trial.suggest_int(key, *given)
        else:
            drawn[name] = round(trial.suggest_float(key, *given), DIGITS)
    return drawn


def _measured(search: Search, spec: Spec, number: int, ledger: Ledger, place: Workplace) -> Trial:
    """A candidate with its row; text in canonical spelling, so that equal ones look equal."""
    try:
        cell = Cell(parse(spec.recipe), Budget.parse(spec.budget) if spec.budget else None)
    except ValueError as error:
        return Trial(number, spec.recipe, spec.budget, None, str(error), None, None)
    recipe, budget = cell.facts.recipe, cell.facts.budget
    done = place.work(dataclasses.replace(spec, recipe=recipe, budget=budget), ledger.rows)
    if done.row is not None:
        ledger.append(done.row)
    row = ledger.get(done.key) if done.key else None
    if row is None:
        return Trial(number, recipe, budget, None, done.failed, None, None)
    return Trial(number, recipe, budget, row, None, search.objective(row), search.violation(row))


def _trials(study: Any, ledger: Ledger) -> list[Trial]:
    found = [json.loads(t.user_attrs[RESULT]) for t in _finished(study)]
    return [Trial(**(fields | {"row": ledger.get(fields["row"] or "")})) for fields in found]


def counted(trials: list[Trial]) -> str:
    """One sentence on how many candidates were allowed."""
    allowed = sum(t.allowed for t in trials)
    failed = sum(t.row is None for t in trials)
    return f"{len(trials)} candidates, {allowed} allowed, {failed} could not be measured"


def shown(trial: Trial) -> str:
    """A trial in one line."""
    if trial.row is None:
        return f"{trial.number}: {trial.text}: {trial.failed}"
    figures = ", ".join(
        f"{METRICS[n].label} {METRICS[n].show(v)}"
        for n in ("retained", "change", "kl", "score")
        if (v := value(trial.row, n)) is not None
    )
    return f"{trial.number}: {trial.text}: {figures}{'' if trial.allowed else ' (not allowed)'}"

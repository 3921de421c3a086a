"""`kvloom run`: an experiment from its file, resumable; rows, record and a short table."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from kvloom.cli._console import INTERRUPTED, console
from kvloom.evaluation import experiment_file, runner
from kvloom.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from kvloom.evaluation.experiment import Experiment, Outcome
    from kvloom.evaluation.subjects import Cell

SHOWN = ("score", "decode_perplexity", "change", "kl", "ratio", "speedup")
FAILED = 1


@dataclass
class Options:
    """What a run is asked for; see `kvloom run --help`."""

    path: Path
    out: Path | None = None
    scale: str = "testbed"
    model: str | None = None
    phases: tuple[int, ...] = ()
    executor: str = "inline"
    workers: int | None = None
    again: bool = False
    dry_run: bool = False


def run(options: Options) -> Experiment:
    """Run an experiment. Raises ValueError or OSError on wrong input, before any work."""
    experiment, fallbacks = experiment_file.read(
        options.path, options.scale, options.model, options.phases
    )
    folder = options.out or default_folder(options)
    out = console()
    if options.dry_run:
        for outcome in experiment.outcomes:
            spec = outcome.spec
            what = spec.task or spec.text
            out.print(f"{spec.grid}: {spec.label} on {what}, {spec.model}, repeat {spec.repeat}", markup=False)  # fmt: skip
        return experiment
    try:
        with _Bars(len(experiment.outcomes)) as watcher:
            runner.run(
                experiment, fallbacks, folder, options.executor, options.workers, watcher,
                options.again, keep=bool(options.phases),
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; finished cells are in {folder}, the same command goes on", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    report(out, experiment, folder, watcher.fresh)
    if runner.failures(experiment):
        raise typer.Exit(FAILED)
    return experiment


def default_folder(options: Options) -> Path:
    """Scales lie apart: their figures say something else."""
    suffix = "" if options.scale == "testbed" else f"-{options.scale}"
    return Path("results") / (options.path.stem + suffix)


def report(out: Console, experiment: Experiment, folder: Path, fresh: int) -> None:
    """The figures of each cell, and what failed."""
    for grid in dict.fromkeys(o.spec.grid for o in experiment.outcomes):
        out.print(_table(experiment, grid))
    known = sum(o.key is not None for o in experiment.outcomes) - fresh
    if known:
        out.print(
            f"{known} of {len(experiment.outcomes)} cells were measured before (--again measures anew)."
        )
    for spec, why in runner.failures(experiment):
        out.print(f"failed  {spec.grid}: {spec.label}: {why}", markup=False, soft_wrap=True)
    for outcome in experiment.outcomes:
        if outcome.fallback:
            out.print(f"fallback  {outcome.spec.label}: {outcome.fallback}", markup=False, soft_wrap=True)  # fmt: skip
    out.print(f"record  {folder / 'experiment.json'}", markup=False, soft_wrap=True)
    out.print(f"report  kvloom report {folder}", markup=False, soft_wrap=True)


def _table(experiment: Experiment, grid: str) -> Table:
    outcomes = experiment.grid(grid)
    table = Table(
        title=f"{experiment.title}: {grid}".replace("[", r"\["),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    several = len({(o.spec.task, o.spec.text) for o in outcomes}) > 1
    names = [n for n in SHOWN if any(o.row and METRICS[n].of(o.row) is not None for o in outcomes)]
    for name in ("recipe", *(["on"] if several else []), *(METRICS[n].label for n in names)):
        table.add_column(name, overflow="fold")
    for o in outcomes:
        cells = [METRICS[n].show(METRICS[n].of(o.row)) if o.row else "" for n in names]
        on = [(o.spec.task or o.spec.text or "").replace("[", r"\[")] if several else []
        table.add_row(o.spec.label.replace("[", r"\["), *on, *cells)
    return table


class _Bars(runner.Watcher):
    """Progress on standard error: bars in a terminal, else a line per cell.

    Attributes:
        fresh: cells measured, not found in the ledger.
    """

    def __init__(self, cells: int):
        self.fresh, self.cells, self.start = 0, cells, time.monotonic()
        self.live = sys.stderr.isatty()
        self.bars = bars.Progress(
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TaskProgressColumn(),
            bars.TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            disable=not self.live,
        )  # fmt: skip
        self.all, self.one = self.bars.add_task("cells", total=cells), self.bars.add_task("")

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.bars.stop()

    def cell(self, cell: Cell, number: int, of: int, steps: int) -> None:
        self.bars.reset(self.one, total=steps, description=str(cell).replace("[", r"\["))

    def advance(self, steps: int) -> None:
        self.bars.advance(self.one, steps)

    def finished(self, outcome: Outcome, fresh: bool, left: int) -> None:
        self.fresh += fresh
        self.bars.advance(self.all)
        if self.live or not (fresh or outcome.failed):
            return
        what = f"failed ({outcome.failed})" if outcome.failed else f"in {outcome.row.took:.1f} s" if outcome.row else "done"  # fmt: skip
        typer.echo(
            f"{outcome.spec.grid}: {outcome.spec.label} {what}{self._remaining(left)}", err=True
        )

    def _remaining(self, left: int) -> str:
        """As long as those measured took on average; found rows cost nothing."""
        if not (self.fresh and left):
            return ""
        seconds = (time.monotonic() - self.start) / self.fresh * left
        return f", {left} cells left, about {seconds / 60:.0f} min"

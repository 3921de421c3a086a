"""`kvloom compare`: recipes side by side, measured through the cache; rows, tables and figures.

`kvloom demo` is the same with everything chosen.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import typer
from rich import progress as bars
from rich.console import Console

from kvloom.cli._console import INTERRUPTED, console
from kvloom.core import registry
from kvloom.evaluation import compare, figures, table
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Protocol
from kvloom.evaluation.subjects import cells_of

if TYPE_CHECKING:
    from kvloom.evaluation.results import Row
    from kvloom.evaluation.subjects import Cell

# The demo takes what is there, in this order, so that it shows the best known methods.
FAVOURITES = ("streaming_llm", "h2o", "snapkv", "tova", "knorm")
DEMO_SCORERS = 2
DEMO_PROTOCOL = Protocol(tokens=896, prefill=640, prefill_runs=1, needles=6, needle_tokens=512)
DEMO_BUDGETS = ("40%", "20%")  # at both, whatever evicts has to; `int4` alone needs 37 %


@dataclass
class Options:
    """What a comparison is asked for; see `kvloom compare --help`."""

    model: str = "testbed"
    text: str = "stdlib"
    recipes: list[str] = field(default_factory=list)
    budgets: list[str] = field(default_factory=list)
    protocol: Protocol = field(default_factory=lambda: Protocol(tokens=1024, prefill=512))
    out: Path = Path("results/compare")
    dtype: str = "bfloat16"
    device: str = "auto"
    threads: int | None = None
    again: bool = False


def demo_recipes() -> list[str]:
    """Recipes for the demo, of methods that are there."""
    known = registry.policies("scorer")
    chosen = [name for name in FAVOURITES if name in known][:DEMO_SCORERS]
    return ["int4", *chosen, *([f"{chosen[-1]} | int4"] if chosen else [])]


def demo_options(out: Path) -> Options:
    """The comparison that `kvloom demo` makes."""
    return Options(
        recipes=demo_recipes(),
        budgets=list(DEMO_BUDGETS),
        protocol=DEMO_PROTOCOL,
        out=out,
        threads=1,  # a small model; waiting threads are slow on a busy machine
    )


def run(options: Options) -> None:
    """Measure, print, draw. Raises ValueError or OSError on wrong input, before any work."""
    cells = cells_of(options.recipes, options.budgets)
    ledger = Ledger(options.out)
    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.protocol.seed)
    try:
        bench = compare.prepare(
            options.model, options.text, options.protocol, options.dtype, options.device
        )
        if options.again:
            ledger.rows.clear()
        with _Bars() as progress:
            rows = compare.run(bench, cells, ledger, progress)
    except KeyboardInterrupt:
        done = f"what was finished is in {ledger.path}, and the same command goes on from there"
        nothing = "nothing was finished yet"
        typer.echo(f"interrupted; {done if ledger.path.exists() else nothing}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        torch.set_num_threads(threads)
    report(console(), rows, ledger, progress.fresh)


def report(out: Console, rows: list[Row], ledger: Ledger, fresh: int) -> None:
    """Print the tables and draw the figures of finished rows."""
    for shown in (table.quality_table(rows), table.time_table(rows)):
        out.print(shown)
    for line in table.notes(rows):
        out.print(line, markup=False)
    drawn = figures.draw(rows, ledger.path.parent)
    if fresh < len(rows):
        out.print(
            f"{len(rows) - fresh} of {len(rows)} rows were measured before (--again measures anew)."
        )
    if ledger.torn:
        out.print(f"{ledger.torn} torn lines of killed runs in {ledger.path} were left alone.")
    out.print(f"rows    {ledger.path}", markup=False, soft_wrap=True)
    for path in drawn:
        out.print(f"figure  {path}", markup=False, soft_wrap=True)


class _Bars(compare.Progress):
    """Progress on standard error: bars in a terminal, else a line per cell.

    Attributes:
        fresh: cells measured, not found in the ledger.
    """

    def __init__(self) -> None:
        self.fresh = 0
        self.live = sys.stderr.isatty()
        self.bars = bars.Progress(
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TaskProgressColumn(),
            bars.TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            disable=not self.live,
        )  # fmt: skip
        self.all, self.one = self.bars.add_task("cells"), self.bars.add_task("")

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def cell(self, cell: Cell, number: int, of: int, steps: int) -> None:
        self.bars.update(self.all, total=of, completed=number - 1)
        self.bars.reset(self.one, total=steps, description=str(cell).replace("[", r"\["))

    def advance(self, steps: int) -> None:
        self.bars.advance(self.one, steps)

    def done(self, cell: Cell, row: Row, fresh: bool) -> None:
        self.fresh += fresh
        self.bars.advance(self.all)
        if fresh and not self.live:
            typer.echo(f"measured {cell} in {row.took:.1f} s", err=True)

"""`kvloom tune`: a search over recipes, resumable; ends with the winner as text."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from kvloom.cli._console import INTERRUPTED
from kvloom.evaluation import search as searches
from kvloom.evaluation import tune


def run(
    path: Path, trials: int, quick: bool, model: str | None, out: Path | None, seed: int,
    console: Console,
) -> None:  # fmt: skip
    """Search. Raises ValueError or OSError on wrong input, before any work."""
    search = searches.read(path, quick, model)
    folder = out or Path("results") / f"tune-{path.stem}{'-quick' if quick else ''}"
    try:
        found = tune.run(
            search, folder, trials, seed, lambda trial: typer.echo(tune.shown(trial), err=True)
        )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; {folder} holds what was measured, the same command goes on", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    console.print(tune.counted(found))
    winner = tune.best(found)
    if winner is None:
        console.print("no candidate is allowed: loosen the limit, or widen the space")
    else:
        console.print(f"best    {tune.shown(winner)}", markup=False, soft_wrap=True)
        console.print(f"recipe  {folder / tune.BEST}", markup=False, soft_wrap=True)
    console.print(f"table   {folder / tune.TRIALS}", markup=False, soft_wrap=True)

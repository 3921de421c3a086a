"""`kvloom report`: figures, tables and one page from the rows of experiments; nothing is measured."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kvloom.evaluation.report import build


def run(folders: list[Path], out: Path | None, latex: bool, console: Console) -> None:
    """Write the report, and say where. Raises ValueError if a folder holds no results."""
    made = build.build(folders, out or _default(folders), latex)
    for path in made.figures:
        if path.suffix == ".png":
            console.print(f"figure  {path}", markup=False, soft_wrap=True)
    for reason in made.missing:
        console.print(f"not drawn: {reason}", markup=False, soft_wrap=True)
    if made.tex is not None:
        console.print(f"latex   {made.pdf or made.tex}", markup=False, soft_wrap=True)
    if made.unbuilt:
        console.print(made.unbuilt, markup=False, soft_wrap=True)
    console.print(f"page    {made.page}", markup=False, soft_wrap=True)


def _default(folders: list[Path]) -> Path:
    """Beside the rows of one experiment; of several, in a folder of its own."""
    return folders[0] / "report" if len(folders) == 1 else Path("results/report")

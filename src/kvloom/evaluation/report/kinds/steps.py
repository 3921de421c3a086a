"""Over the document: entries, bytes and time per step as the cache grows, a figure per budget."""

from __future__ import annotations

import dataclasses

from kvloom.evaluation import equal, figures
from kvloom.evaluation import table as terminal
from kvloom.evaluation.report.blocks import Block, Note, Picture
from kvloom.evaluation.report.data import MARKED, Cell, Data, Missing
from kvloom.evaluation.results import Row

OPTIONS = {"budgets": "which budgets, a figure each; default: all"}


def make(data: Data) -> list[Block]:
    """Raises Missing without rows of documents, or of the budgets asked for."""
    cells = data.subjects()
    rows = [_named(row, cell) for cell in cells for row in cell.rows[:1] if isinstance(row, Row)]
    if not rows:
        raise Missing("no row of a document, which is where steps are timed")
    grouped = equal.groups(rows)
    free = grouped.pop(None, [])
    asked = data.names("budgets", [b for b in grouped if b is not None])
    chosen = {b: grouped[b] for b in asked if b in grouped}
    if asked and not chosen:
        raise Missing(f"no row at a budget of {', '.join(asked)}")
    blocks: list[Block] = []
    for budget, held in chosen.items() or {None: []}.items():
        figure = figures.over_document([*free, *held])
        at = f" at a budget of {budget}" if budget else ""
        blocks.append(
            Picture(
                figure, f"entries, bytes and time per token over the document{at}", budget or ""
            )
        )
    return [
        *blocks,
        Note("Of repeats, the first; times are medians of runs of tokens."),
        *([Note(MARKED)] if any(cell.changes and cell.rows for cell in cells) else []),
        *map(Note, terminal.busy(rows)),
    ]


def _named(row: Row, cell: Cell) -> Row:
    """A row under the name that all figures have for it."""
    return dataclasses.replace(row, subject=dataclasses.replace(row.subject, recipe=cell.name))

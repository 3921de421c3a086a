"""Retrieval by length and depth: one panel per recipe and budget, one field per place of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import PercentFormatter

from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Block, Entry, Note, Picture, Table
from kvloom.evaluation.report.data import Cell, Data, Missing
from kvloom.evaluation.report.equality import statements
from kvloom.evaluation.task_results import TaskRow

OPTIONS = {"columns": "panels side by side, default 4"}
DEEPEST = 20  # depths are rounded to 1 / DEEPEST

Place = tuple[int, float]


def make(data: Data) -> list[Block]:
    """Raises Missing without answers whose depth is known."""
    held = [(cell, found) for cell in data.subjects() if (found := _scores(cell))]
    if not held:
        raise Missing("no task row has answers with a depth: it takes a needle task")
    lengths = sorted({length for _, found in held for length, _ in found})
    depths = sorted({depth for _, found in held for _, depth in found})
    across = min(len(held), int(data.option("columns", 4)))
    down = -(-len(held) // across)
    width = max(2.8, 0.75 * len(lengths) + 1.4)
    figure = style.new(width * across + 1.3, (max(1.9, 0.36 * len(depths)) + 1.3) * down + 0.4)
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(held) :]:
        axes.set_axis_off()
    for i, (axes, (cell, found)) in enumerate(zip(panels.flat, held, strict=False)):
        _panel(axes, cell, found, lengths, depths)
        if i % across == 0:
            axes.set_ylabel("depth of the answer", fontsize=9)
        if i + across >= len(held):
            axes.set_xlabel("length of the context, tokens", fontsize=9)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), style.MAP), ax=panels.ravel().tolist(),
                          shrink=0.7, pad=0.01)  # fmt: skip
    bar.set_label("share found (higher is better)", fontsize=9)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(data.figure.title, fontsize=11)
    rows = [row for cell, _ in held for row in cell.rows]
    alt = "share of planted facts found, by length of the context and depth, a panel per recipe"
    return [
        Picture(figure, alt),
        _table(held, lengths),
        *map(Note, [*_notes(held), *statements(rows)]),
    ]


def _scores(cell: Cell) -> dict[Place, list[tuple[float, str]]]:
    """Scores and keys of rows by place, of the answers whose depth is known."""
    found: dict[Place, list[tuple[float, str]]] = {}
    for row in cell.rows:
        if isinstance(row, TaskRow):
            for answer in row.answers:
                if answer.depth is not None:
                    length = length_of(row.task.task) or answer.tokens
                    depth = round(answer.depth * DEEPEST) / DEEPEST
                    found.setdefault((length, depth), []).append((answer.score, row.key))
    return found


def length_of(task: str) -> int | None:
    """`length=...` of a task's text."""
    found = re.search(r"\blength=(\d+)", task)
    return int(found[1]) if found else None


def _panel(
    axes: Axes, cell: Cell, found: dict[Place, list[tuple[float, str]]], lengths: Sequence[int],
    depths: Sequence[float],
) -> None:  # fmt: skip
    axes.set_facecolor(style.ABSENT)
    shares = [[_mean(found.get((x, y))) for x in lengths] for y in depths]
    axes.imshow(shares, cmap=style.MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for i, line in enumerate(shares):
        for j, share in enumerate(line):
            if share == share:
                axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8,
                          color="black" if share > 0.55 else "white")  # fmt: skip
    axes.set_xticks([i + 0.5 for i in range(len(lengths) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(depths) - 1)], minor=True)
    axes.grid(True, which="minor", color="white", lw=1.2)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
    at = f" @ {cell.spec.budget}" if cell.spec.budget else ""
    axes.set_title(f"{style.label(cell.name, 34)}{at}", fontsize=9)


def _mean(scores: Sequence[tuple[float, str]] | None) -> float:
    return sum(s for s, _ in scores) / len(scores) if scores else float("nan")


def _table(held: Sequence[tuple[Cell, dict]], lengths: Sequence[int]) -> Table:
    """Shares by length over all depths, and of all."""
    rows = []
    for cell, found in held:
        entries = [Entry(cell.spec.budget or ""), Entry(cell.name)]
        for wanted in (*((n,) for n in lengths), tuple(lengths)):
            scores = [x for (n, _), some in found.items() if n in wanted for x in some]
            entries.append(_share(scores))
        rows.append(entries)
    return Table(["budget", "recipe", *(f"{n:,} tokens" for n in lengths), "all"], rows, 2)


def _share(scores: Sequence[tuple[float, str]]) -> Entry:
    if not scores:
        return Entry("n/a")
    mean = _mean(scores)
    right = sum(s for s, _ in scores)
    keys = tuple(dict.fromkeys(key for _, key in scores))
    return Entry(f"{mean:.0%}", f"{right:g} of {len(scores)}", mean, keys)


def _notes(held: Sequence[tuple[Cell, dict]]) -> list[str]:
    counts = {len(some) for _, found in held for some in found.values()}
    views = sorted({r.task.view for cell, _ in held for r in cell.rows if isinstance(r, TaskRow)})
    meaning = {
        "blind": "the context was compressed before the question was seen",
        "sighted": "the question was in view when the context was compressed",
    }
    each = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    return [f"{each} examples per field; " + "; ".join(meaning.get(v, v) for v in views) + "."]

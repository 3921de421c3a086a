"""Time and memory beside a full cache of the same run: TTFT, TPOT, throughput, bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from kvloom.evaluation import table as terminal
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Block, Entry, Note, Picture, Table, measured
from kvloom.evaluation.report.data import Cell, Data, Missing
from kvloom.evaluation.results import Row
from kvloom.evaluation.statistics import summary

OPTIONS: dict[str, str] = {}
KIB = 1024.0


@dataclass(frozen=True)
class Panel:
    """One measure: of the recipe, and of the full cache beside it."""

    label: str
    own: Callable[[Row], float | None]
    dense: Callable[[Row], float | None]


PANELS = (
    Panel("TTFT, ms (lower is better)", lambda r: 1e3 * r.timing.ttft, lambda r: 1e3 * r.timing.dense_ttft),
    Panel("TPOT, ms (lower is better)", lambda r: 1e3 * r.timing.tpot, lambda r: 1e3 * r.timing.dense_tpot),
    Panel("tokens per second (higher is better)", lambda r: r.timing.throughput,
          lambda r: 1 / r.timing.dense_tpot if r.timing.dense_tpot else None),
    Panel("bytes, KiB (lower is better)", lambda r: r.bytes.compressed_mean / KIB, lambda r: r.bytes.dense_mean / KIB),
)  # fmt: skip
NUMBERS = (
    "ttft",
    "ttft_change",
    "tpot",
    "tpot_worst",
    "speedup",
    "throughput",
    "nbytes",
    "retained",
)


def make(data: Data) -> list[Block]:
    """Raises Missing without rows of documents."""
    cells = [c for c in data.subjects() if _documents(c)]
    if not cells:
        raise Missing("no row of a document, which is where times are measured")
    labels = [_label(c) for c in cells]
    looks = style.looks(data.recipes)
    figure = style.new(3.0 + 3.1 * len(PANELS), 1.6 + 0.34 * len(cells))
    for axes, panel in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        _draw(axes, panel, cells, looks)
    figure.axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    figure.axes[0].set_ylim(len(labels) - 0.4, -0.6)
    style.legend(figure, 120)
    figure.suptitle(data.figure.title, fontsize=11)
    rows = [row for c in cells for row in _documents(c)]
    return [
        Picture(figure, "times and bytes of each recipe, with a full cache's from the same run"),
        _table(cells),
        Note(
            "The black mark is a full cache measured in turns with the recipe: its TTFT and TPOT in the same run, "
            "one over its TPOT, and a 16-bit dense cache of the same tokens."
        ),
        *map(Note, terminal.busy(rows)),
    ]


def _documents(cell: Cell) -> list[Row]:
    return [r for r in cell.rows if isinstance(r, Row) and not r.subject.baseline]


def _label(cell: Cell) -> str:
    at = f" @ {cell.spec.budget}" if cell.spec.budget else ""
    return style.label(cell.name, 60) + at


def _draw(axes: Axes, panel: Panel, cells: Sequence[Cell], looks: dict[str, style.Look]) -> None:
    for y, cell in enumerate(cells):
        own = [v for r in _documents(cell) if (v := panel.own(r)) is not None]
        dense = [v for r in _documents(cell) if (v := panel.dense(r)) is not None]
        if own:
            found = summary(own)
            axes.barh(y, found.mean, height=0.62, color=looks[cell.name].colour, alpha=0.85)
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [y, y], color="black", lw=1, marker="|", ms=5)
        if dense:
            axes.plot(
                [sum(dense) / len(dense)], [y], color="black", marker="|", ms=15, mew=2.2, ls="",
                label="full cache, same run",
            )  # fmt: skip
    axes.set_xlabel(panel.label, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(left=0)
    axes.grid(True, axis="x", **style.GRID)
    axes.set_axisbelow(True)


def _table(cells: Sequence[Cell]) -> Table:
    rows = [
        [
            Entry(c.spec.budget or ""), Entry(c.name),
            *(measured(n, c.summary(n), c.keys(n)) for n in NUMBERS),
        ]
        for c in cells
    ]  # fmt: skip
    return Table(["budget", "recipe", *(METRICS[n].label for n in NUMBERS)], rows, 2)

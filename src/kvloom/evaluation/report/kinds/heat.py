"""A metric over two parameters, a field for each pair of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Block, Entry, Note, Picture, Table, measured
from kvloom.evaluation.report.data import Cell, Data, Missing, parameter, series
from kvloom.evaluation.report.equality import statements

OPTIONS = {
    "x": "a parameter, as in sweep",
    "y": "another one",
    "metric": "what is shown, default 'change'",
}

Held = tuple[Any, Any, Cell]


def make(data: Data) -> list[Block]:
    """Raises ValueError without two parameters, Missing if no measured cell has both."""
    x, y, metric = (data.option(n, d) for n, d in (("x", None), ("y", None), ("metric", "change")))
    if not isinstance(x, str) or not isinstance(y, str):
        raise ValueError("options x and y are required: which two parameters")
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: one of {', '.join(METRICS)}")
    held = [
        (across, down, cell)
        for cell in data.subjects(x)
        if (across := parameter(cell.spec, x)) is not None
        and (down := parameter(cell.spec, y)) is not None
        and cell.values(metric)
    ]
    if not held:
        raise Missing(f"no cell with parameters {x!r} and {y!r} has {METRICS[metric].label}")
    panels: dict[str, list[Held]] = {}
    for name, one in zip(series([c for _, _, c in held], [x, y]), held, strict=True):
        panels.setdefault(name, []).append(one)
    columns, lines = (sorted({one[i] for one in held}, key=_order) for i in (0, 1))
    width = max(3.2, 0.85 * len(columns) + 1.2)
    figure = style.new(width * len(panels) + 1, max(2.2, 0.5 * len(lines)) + 1.2)
    means = [s.mean for *_, c in held if (s := c.summary(metric)) is not None]
    for axes, (name, some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):  # fmt: skip
        image = _panel(axes, some, columns, lines, metric, (min(means), max(means)))
        axes.set(xlabel=x, ylabel=y, title=style.label(name, 40))
    bar = figure.colorbar(image, ax=figure.axes[: len(panels)], pad=0.02)
    style.metric_axis(bar.ax, "y", metric)
    figure.suptitle(data.figure.title, fontsize=11)
    return [
        Picture(figure, f"{METRICS[metric].label} over {x} and {y}"),
        _table(x, y, metric, held),
        *map(Note, statements([row for *_, c in held for row in c.rows])),
    ]


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, str(value)


def _panel(
    axes: Axes, held: Sequence[Held], columns: Sequence[Any], lines: Sequence[Any], metric: str,
    span: tuple[float, float],
) -> Any:  # fmt: skip
    found = {(a, b): s.mean for a, b, c in held if (s := c.summary(metric)) is not None}
    values = [[found.get((a, b), float("nan")) for a in columns] for b in lines]
    axes.set_facecolor(style.ABSENT)
    low, high = span
    image = axes.imshow(values, cmap=style.MAP, vmin=low, vmax=high, aspect="auto", origin="lower")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                dark = (value - low) < 0.55 * (high - low)
                axes.text(j, i, METRICS[metric].show(value), ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(columns)), [str(v) for v in columns])
    axes.set_yticks(range(len(lines)), [str(v) for v in lines])
    return image


def _table(x: str, y: str, metric: str, held: Sequence[Held]) -> Table:
    rows = [
        [
            Entry(str(a)), Entry(str(b)), Entry(c.name), Entry(c.spec.budget or ""),
            measured(metric, c.summary(metric), c.keys(metric)),
        ]
        for a, b, c in held
    ]  # fmt: skip
    return Table([x, y, "recipe", "budget", METRICS[metric].label], rows, words=4, folded=True)

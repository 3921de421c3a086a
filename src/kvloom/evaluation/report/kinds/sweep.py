"""Metrics against one parameter of a recipe, an option of the cells, or the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Block, Entry, Note, Picture, Table, measured
from kvloom.evaluation.report.data import Cell, Data, Missing, parameter, series
from kvloom.evaluation.report.equality import statements
from kvloom.evaluation.statistics import Summary

OPTIONS = {
    "parameter": "name of the parameter, e.g. 'every' or 'lazy.every'; 'budget'; or an option of the cells",
    "metrics": "a panel each; default: change, tpot, score, as far as measured",
    "label": "what to call the parameter on the axis, with its unit",
    "log": "true: a logarithmic axis; default: where the values span more than a factor of 8",
}
DEFAULT = ("change", "tpot", "score")


def make(data: Data) -> list[Block]:
    """Raises ValueError without a parameter, Missing if no measured cell has it."""
    name = data.option("parameter", None)
    if not isinstance(name, str):
        raise ValueError("option parameter is required: which parameter to sweep over")
    held = [(v, c) for c in data.subjects(name) if (v := parameter(c.spec, name)) is not None and c.rows]  # fmt: skip
    if not held:
        raise Missing(f"no measured cell has a parameter {name!r}")
    held.sort(key=lambda x: _order(x[0]))
    metrics = [m for m in data.names("metrics", DEFAULT) if any(c.values(m) for _, c in held)]
    if not metrics:
        raise Missing("the cells have none of the metrics")
    figure = style.new(0.8 + 4.4 * len(metrics), 4.2)
    lines = series([c for _, c in held], [name])
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        _draw(axes, held, metric, lines)
        _parameter_axis(axes, [v for v, _ in held], data)
        axes.set_xlabel(data.option("label", name), fontsize=9)
    if len(figure.axes[0].get_legend_handles_labels()[1]) > 1:
        style.legend(figure, int(15 * figure.get_figwidth()))
    figure.suptitle(data.figure.title, fontsize=11)
    rows = [row for _, c in held for row in c.rows]
    return [
        Picture(figure, f"{', '.join(METRICS[m].label for m in metrics)} against {name}"),
        _table(name, held, metrics),
        *map(Note, statements(rows)),
    ]


def _order(value: Any) -> tuple[int, float, str]:
    number = _number(value)
    return (0, number, "") if number is not None else (1, 0.0, str(value))


def _number(value: Any) -> float | None:
    if isinstance(value, str) and value.endswith("%"):
        value = value[:-1]
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _draw(axes: Axes, held: Sequence[tuple[Any, Cell]], metric: str, names: Sequence[str]) -> None:
    """A line for all that differ in nothing else; `names`: of each cell its line's."""
    places = _places([v for v, _ in held])
    lines: dict[str, list[tuple[float, Summary]]] = {}
    for x, name, (_, cell) in zip(places, names, held, strict=True):
        found = cell.summary(metric)
        if found is not None:
            lines.setdefault(name, []).append((x, found))
    for i, (name, points) in enumerate(lines.items()):
        bars = [
            [max(0.0, s.mean - (s.mean if s.low is None else s.low)) for _, s in points],
            [max(0.0, (s.mean if s.high is None else s.high) - s.mean) for _, s in points],
        ]
        axes.errorbar(
            [x for x, _ in points], [s.mean for _, s in points],
            yerr=bars if any(map(any, bars)) else None, capsize=3, lw=1.4, ms=7,
            color=style.COLOURS[i % 7], marker=style.MARKERS[i % 8], label=style.label(name),
        )  # fmt: skip
    style.metric_axis(axes, "y", metric)
    style.roomy(axes, metric)
    axes.grid(True, **style.GRID)


def _places(values: Sequence[Any]) -> list[float]:
    """Where values stand on the axis: themselves if they are numbers, else one after another."""
    numbers = [_number(v) for v in values]
    if all(n is not None for n in numbers):
        return [n for n in numbers if n is not None]
    order = list(dict.fromkeys(map(str, values)))
    return [float(order.index(str(v))) for v in values]


def _parameter_axis(axes: Axes, values: Sequence[Any], data: Data) -> None:
    places = sorted(dict(zip(_places(values), map(str, values), strict=True)).items())
    positive = [x for x, _ in places if x > 0]
    wide = len(positive) > 2 and positive[-1] > 8 * positive[0] and _number(values[0]) is not None
    if data.option("log", wide):
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5) if places[0][0] <= 0 else axes.set_xscale("log")  # fmt: skip
    axes.set_xticks([x for x, _ in places], [t for _, t in places], fontsize=8, minor=False)
    axes.set_xticks([], minor=True)


def _table(name: str, held: Sequence[tuple[Any, Cell]], metrics: Sequence[str]) -> Table:
    rows = [
        [
            Entry(str(v), value=_number(v)), Entry(c.name), Entry(c.spec.budget or ""),
            *(measured(m, c.summary(m), c.keys(m)) for m in metrics),
        ]
        for v, c in held
    ]  # fmt: skip
    return Table(
        [name, "recipe", "budget", *(METRICS[m].label for m in metrics)], rows, words=3, folded=True
    )

"""One metric against another, a line per recipe through its budgets; what several kinds draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvloom.evaluation.figures import COLLAPSE, FULL
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Entry, Table, measured
from kvloom.evaluation.report.data import Cell, Data, Missing
from kvloom.evaluation.statistics import Summary

ROUNDING = 1e-6  # nats: a full cache's own KL, by the order of its sums


@dataclass(frozen=True)
class Point:
    """A recipe at a budget: `x` and `y` are means over the rows that have both."""

    cell: Cell
    x: Summary
    y: Summary

    @property
    def recipe(self) -> str:
        return self.cell.name


def points(cells: Sequence[Cell], x: str, y: str) -> list[Point]:
    """Of the cells that have both metrics, finite; x of the rows that have y."""
    found = []
    for cell in cells:
        both = [o for o in cell.outcomes if o.row is not None and METRICS[x].of(o.row) is not None
                and METRICS[y].of(o.row) is not None]  # fmt: skip
        shared = Cell(cell.spec, tuple(both))
        across, up = shared.summary(x), shared.summary(y)
        if across is not None and up is not None and _finite(across) and _finite(up):
            found.append(Point(shared, across, up))
    return found


def _finite(found: Summary) -> bool:
    return abs(found.mean) != float("inf") and found.mean == found.mean


def panels(data: Data, x: str, names: Sequence[str]) -> dict[str, list[Point]]:
    """Points of each metric that was measured. Raises Missing if none was."""
    cells = data.subjects()
    found = {y: points(cells, x, y) for y in names}
    found = {y: held for y, held in found.items() if held}
    if not found:
        raise Missing(f"no row has {METRICS[x].label} and any of: {', '.join(METRICS[n].label for n in names)}")  # fmt: skip
    return found


def draw(axes: Axes, held: Sequence[Point], looks: dict[str, style.Look], y: str) -> None:
    """Lines with intervals; a full cache is a dashed line across."""
    for recipe in dict.fromkeys(p.recipe for p in held):
        own = sorted((p for p in held if p.recipe == recipe), key=lambda p: p.x.mean)
        look = looks[recipe]
        xs, ys = [p.x.mean for p in own], [p.y.mean for p in own]
        axes.errorbar(
            xs, ys, yerr=_bars(own), color=look.colour, marker=look.marker, lw=1.2,
            ms=11 if recipe == FULL else 7, ls="-" if len(own) > 1 else "", capsize=2, elinewidth=0.9,
            label=style.label(recipe), alpha=0.9,
        )  # fmt: skip
        if recipe == FULL and y != "kl":
            axes.axhline(ys[0], color="black", ls="--", lw=0.8, alpha=0.5, zorder=0)
    _scale(axes, [p.y.mean for p in held], y)
    style.metric_axis(axes, "y", y)
    axes.grid(True, **style.GRID)


def _bars(held: Sequence[Point]) -> list[list[float]] | None:
    if all(p.y.low is None for p in held):
        return None
    low = [max(0.0, p.y.mean - (p.y.mean if p.y.low is None else p.y.low)) for p in held]
    high = [max(0.0, (p.y.mean if p.y.high is None else p.y.high) - p.y.mean) for p in held]
    return [low, high]


def _scale(axes: Axes, values: Sequence[float], y: str) -> None:
    """Logarithmic where values span decades; a KL of rounding alone is as good as zero."""
    if y == "kl" and any(v > ROUNDING for v in values):
        axes.set_yscale("symlog", linthresh=min(v for v in values if v > ROUNDING))
    elif y == "change" and max(values) > COLLAPSE:
        axes.set_yscale("symlog", linthresh=0.1)
    elif (
        y in ("perplexity", "decode_perplexity")
        and min(values) > 0
        and max(values) > 10 * min(values)
    ):
        axes.set_yscale("log")
    elif y == "score":
        axes.set_ylim(-0.04, 1.04)


def share_axis(axes: Axes, x: str) -> None:
    """Retained bytes on a logarithmic axis, marked at halves."""
    axes.set_xscale("log", base=2)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.1, high * 1.1)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_minor_locator(NullLocator())
    style.metric_axis(axes, "x", x)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g}%"))
    if x == "retained":
        axes.set_xlabel("bytes retained, of a 16-bit dense cache", fontsize=9)


def front(held: Sequence[Point], y: str) -> list[Point]:
    """Those that no other beats: none has at most their x and a better y, or less x and as good a y."""
    sign = -1 if METRICS[y].better == "higher" else 1
    best, found = float("inf"), []
    for point in sorted(held, key=lambda p: (p.x.mean, sign * p.y.mean)):
        if sign * point.y.mean < best:
            best = sign * point.y.mean
            found.append(point)
    return found


def numbers(x: str, panels: dict[str, list[Point]], on_front: set[tuple[str, int]]) -> Table:
    """The figure's numbers, each with its rows; those of `on_front` (metric, index) are marked."""
    rows = [
        [
            Entry(p.cell.spec.budget or ""), Entry(p.recipe), Entry(METRICS[y].label),
            measured(x, p.x, p.cell.keys(x)), measured(y, p.y, p.cell.keys(y)),
            *([Entry("yes" if (y, i) in on_front else "", value=float((y, i) in on_front))] if on_front else []),
        ]
        for y, held in panels.items()
        for i, p in enumerate(held)
    ]  # fmt: skip
    heads = ["budget", "recipe", "metric", METRICS[x].label, "value"]
    return Table([*heads, *(["on the front"] if on_front else [])], rows, words=3, folded=True)

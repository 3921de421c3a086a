"""How figures of the report look: colours that everybody tells apart, units on axes, legends outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvloom.evaluation.figures import COLOURS, DASHES, FULL, MARKERS
from kvloom.evaluation.metrics import METRICS, Metric

DPI = 150
GRID: dict[str, Any] = {"alpha": 0.25}
MAP = "cividis"  # made for colour-blind eyes; brightness rises evenly
ABSENT = "#DDDDDD"


@dataclass(frozen=True)
class Look:
    """Of one recipe in every figure of an experiment."""

    colour: str
    marker: str
    dashes: Any


def looks(recipes: Sequence[str]) -> dict[str, Look]:
    """Recipe -> look, in the order of the experiment; the full cache is black."""
    others = [r for r in recipes if r != FULL]
    found = {
        r: Look(COLOURS[i % 8], MARKERS[(i + i // 8) % 8], DASHES[i % len(DASHES)])
        for i, r in enumerate(others)
    }
    return {FULL: Look("black", "*", (0, (2, 2))), **found}


def label(recipe: str, most: int = 60) -> str:
    """A recipe as it stands in a legend."""
    name = "none (full cache)" if recipe == FULL else recipe
    return name if len(name) <= most else name[: most - 3] + "..."


def new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, width: int, handles: Sequence[Any] = ()) -> None:
    """One legend below everything: of the given handles, or of all that is labelled in the panels, each
    label once; in as many columns as fit into `width` characters.
    """
    named: dict[str, Any] = {str(h.get_label()): h for h in handles}
    if not handles:
        for axes in figure.axes:
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                named.setdefault(str(text), handle)
    if not named:
        return
    columns = max(1, min(len(named), width // (max(map(len, named)) + 7)))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=columns,
        frameon=False, fontsize=9,
    )  # fmt: skip


def caption(metric: Metric) -> str:
    """For an axis: label with unit, and which way is good."""
    return f"{metric.label} ({metric.better} is better)" if metric.better else metric.label


def metric_axis(axes: Axes, which: str, name: str, short: bool = False) -> None:
    """Label an axis (`"x"` or `"y"`) by a metric, and mark it in the metric's unit."""
    metric = METRICS[name]
    axis: Axis = getattr(axes, f"{which}axis")
    axis.set_label_text(metric.label if short else caption(metric), fontsize=9)
    if "%" in metric.form:
        sign = "+" if "+" in metric.form else ""
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:{sign if v else ''},.4g}%"))
    elif metric.form.endswith("x"):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    elif name in ("nbytes", "peak"):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1024:,.5g} KiB"))
    axis.set_minor_formatter(NullFormatter())


def roomy(axes: Axes, name: str) -> None:
    """Give the y axis at least two per cent, or a twentieth of its values: less is noise, and should look so."""
    low, high = axes.get_ylim()
    least = 0.02 if "%" in METRICS[name].form else 0.05 * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def save(figure: Figure, folder: Path, stem: str, kinds: Sequence[str]) -> list[Path]:
    """Write a figure in several formats; the same figure gives the same bytes."""
    made = []
    with matplotlib.rc_context({"svg.hashsalt": stem}):
        for kind in kinds:
            path = folder / f"{stem}.{kind}"
            facts = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
            figure.savefig(path, dpi=DPI, metadata=facts)
            made.append(path)
    return made

"""Figures, made from rows and from nothing else; PNG files, without a display."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

from kvloom.evaluation import equal
from kvloom.evaluation.results import Row

# Okabe and Ito's colours, told apart by everybody; the full cache is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
MARKERS = "osD^vPX*"
DASHES = (
    "-",
    (0, (6, 1.5)),
    (0, (3, 1)),
    (0, (1, 1)),
    (0, (6, 1, 1, 1)),
)  # 5: 40 looks with colours
FULL = "none"
LINES = 8  # the most recipes that one figure over the document shows
UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
COLLAPSE = 1.0  # a change of perplexity from which its axis turns logarithmic


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw every figure of one comparison; the paths, the most telling one last."""
    folder = Path(folder)
    made = []
    for name, figure in (("document.png", over_document(rows)), ("quality.png", quality(rows))):
        figure.savefig(folder / name, dpi=150)
        made.append(folder / name)
    return made


# -- quality against bytes -----------------------------------------------------------------------


def quality(rows: Sequence[Row]) -> Figure:
    """Perplexity and KL against the full cache, and needle recall if measured, by mean bytes.

    What is no finite number is not drawn.
    """
    recall = rows[0].protocol.needles > 0
    figure = Figure(figsize=(15 if recall else 10.5, 5), layout="constrained")
    panels = figure.subplots(1, 3 if recall else 2)
    for panel, measure in zip(panels, ("perplexity", "kl", "recall"), strict=False):
        _scatter(panel, rows, measure)
    panels[0].set_ylabel("perplexity against full cache (lower is better)")
    if max((v for r in rows if (v := _value(r, "perplexity")) is not None), default=0) > COLLAPSE:
        panels[0].set_yscale("symlog", linthresh=0.1)
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:+,.10g}%"))
    panels[1].set_ylabel("KL to the full cache, nats (lower is better)")
    if recall:
        panels[2].set_ylabel("planted facts found (higher is better)")
        panels[2].set_ylim(-0.05, 1.05)
        panels[2].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    _legend(figure, panels[0], 150)
    figure.suptitle(f"Quality against real bytes: {_setting(rows[0])}", fontsize=11)
    return figure


def _value(row: Row, measure: str) -> float | None:
    q = row.quality
    if measure == "recall":
        return q.needles_right / q.needles if q.needles else None
    # against dense on the same tokens: a baseline is scored on some of them only
    value = q.kl if measure == "kl" else q.change
    if value is None or not math.isfinite(value):
        return None
    return None if measure == "kl" and value <= 0 else value  # its axis is logarithmic


def _scatter(axes: Axes, rows: Sequence[Row], measure: str) -> None:
    """One line per recipe through its budgets; what keeps no cache is a horizontal line."""
    look = _looks(rows)
    for recipe, held in _by_recipe(rows).items():
        values = [(r.bytes.compressed_mean / 1024, _value(r, measure)) for r in held]
        points = sorted((x, y) for x, y in values if y is not None)
        colour, marker, _ = look[recipe]
        if held[0].subject.baseline:
            for _, y in points:
                axes.axhline(y, label=_name(recipe), ls=":", color=colour)
            continue
        if not points:
            continue
        size = 10 if recipe == FULL else 7
        axes.plot([x for x, _ in points], [y for _, y in points], label=_name(recipe),
                  color=colour, marker=marker, markersize=size, lw=1.2, alpha=0.9)  # fmt: skip
    if not axes.lines:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"{measure} was not measured", ha="center", transform=axes.transAxes)
        return
    if measure == "kl":
        axes.set_yscale("log")
    dense = [v for r in rows if r.subject.recipe == FULL and (v := _value(r, measure)) is not None]
    if dense and measure != "kl":
        axes.axhline(dense[0], color="black", ls="--", lw=0.8, alpha=0.5, zorder=0)
    _bytes_axis(axes, rows)
    axes.grid(True, alpha=0.25)


def _bytes_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Bytes on a logarithmic axis below, the compression ratio above."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _size(x * 1024)))
    axes.xaxis.set_minor_locator(NullLocator())
    part = " (compressed layers)" if any(r.bytes.other_mean for r in rows) else ""
    axes.set_xlabel(f"bytes of the cache{part}, mean over the decoded tokens")
    low, high = axes.get_xlim()
    dense = rows[0].bytes.dense_mean / 1024
    ratios = [2.0**i for i in range(-8, 12) if low <= dense / 2.0**i <= high]
    top = axes.twiny()
    top.set_xscale("log")
    top.set_xlim(low, high)
    top.set_xticks([dense / r for r in ratios], [f"{r:g}x" for r in ratios], minor=False)
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xlabel("compression ratio (16-bit dense / real bytes)")


# -- over the document ---------------------------------------------------------------------------


def over_document(rows: Sequence[Row]) -> Figure:
    """Entries kept, bytes and time per token while the document is read, at one budget."""
    budget, shown, of = _one_budget(rows)
    look = _looks(rows)
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for row in shown:
        s, recipe = row.series, row.subject.recipe
        colour, _, dashes = look[recipe]
        style: dict[str, Any] = {"color": colour, "ls": dashes, "label": _name(recipe), "lw": 1.5}
        style["zorder"] = 2 if dashes == "-" else 3  # lines of equal height show through the gaps
        panels[0].plot(s.seen, s.entries, **style)
        if not row.subject.baseline:
            panels[1].plot(s.seen, [n / 1024 for n in s.nbytes], **style)
        panels[2].plot(*_calm(s.seen, s.seconds), **style)
    panels[0].set_ylabel("entries per KV head")
    panels[2].set_ylabel("time per token, ms (medians)")
    panels[2].set_xlabel("tokens seen")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.25)
    _binary_axis(panels[1])
    _usual_range(panels[2])
    _legend(figure, panels[0], 105)
    at = f" at a budget of {budget}" if budget else ""
    part = f" ({len(shown)} of {of} recipes)" if len(shown) < of else ""
    figure.suptitle(f"Over the document{at}{part}: {_setting(rows[0])}", fontsize=11)
    return figure


def _one_budget(rows: Sequence[Row]) -> tuple[str | None, list[Row], int]:
    """Rows without a budget, and those of the budget that most rows have (the last of equals).

    Then how many these were: at most `LINES` are given, from both kinds.
    """
    grouped = equal.groups(rows)
    free = grouped.pop(None, [])
    if not grouped:
        return None, free[:LINES], len(free)
    most = max(len(held) for held in grouped.values())
    budget = [b for b, held in grouped.items() if len(held) == most][-1]
    room = max(LINES // 2, LINES - len(free))  # for rows of the budget
    shown = [*free[: max(LINES - most, LINES - room)], *grouped[budget][:room]]
    return budget, shown, len(free) + most


def _binary_axis(axes: Axes) -> None:
    """KiB on the y axis, marked at whole powers of two times a few, all in one unit."""
    top = axes.get_ylim()[1]
    axes.yaxis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(top / 8))))
    unit, size = _unit(top * 1024)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 1024 / size:g}"))
    axes.set_ylabel(f"{unit} of the cache")


def _usual_range(axes: Axes) -> None:
    """Cut single spikes off: the top is 1.5 times what 95 % of the drawn values stay below."""
    drawn: list[float] = sorted(y for x in axes.lines for y in cast(list[float], x.get_ydata()))
    axes.set_ylim(0, min(axes.get_ylim()[1], 1.5 * drawn[math.ceil(0.95 * len(drawn)) - 1]))


def _calm(seen: list[int], seconds: list[float]) -> tuple[list[int], list[float]]:
    """Medians of runs of bins: single tokens jump with whatever else the machine does."""
    width = max(1, len(seen) // 25)
    runs = [slice(i, i + width) for i in range(0, len(seen), width)]
    return (
        [seen[r][len(seen[r]) // 2] for r in runs],
        [1e3 * statistics.median(seconds[r]) for r in runs],
    )


# -- shared --------------------------------------------------------------------------------------


def _legend(figure: Figure, axes: Axes, width: int) -> None:
    """One legend below everything, in as many columns as fit into `width` characters."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    fits = sum(len(label) + 7 for label in labels) <= width
    columns = len(labels) if fits else max(1, width // (max(map(len, labels)) + 7))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _by_recipe(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.subject.recipe, []).append(row)
    return found


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, str, Any]]:
    """Recipe -> colour, marker and dashes, the same in every figure of a comparison."""
    recipes = [r for r in _by_recipe(rows) if r != FULL]
    looks = {
        r: (COLOURS[i % 8], MARKERS[(i + i // 8) % 8], DASHES[i % len(DASHES)])
        for i, r in enumerate(recipes)
    }
    return {FULL: ("black", "*", (0, (2, 2))), **looks}


def _name(recipe: str) -> str:
    name = "none (full cache)" if recipe == FULL else recipe
    return name if len(name) <= 48 else name[:45] + "..."


def _setting(row: Row) -> str:
    p = row.protocol
    return (
        f"{Path(row.model.name).name}, {row.text.name}, {p.tokens} tokens "
        f"({p.tokens - p.prefill} decoded one by one), {row.model.dtype}"
    )


def _size(n: float) -> str:
    unit, size = _unit(n)
    return f"{n / size:g} {unit}"


def _unit(n: float) -> tuple[str, int]:
    return next(((unit, size) for unit, size in UNITS if n >= size), UNITS[-1])

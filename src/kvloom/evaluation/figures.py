"""Figures, made from rows and from nothing else; PNG files, without a display."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvloom.evaluation import equal
from kvloom.evaluation.results import Row

# Okabe and Ito's colours, told apart by everybody; the full cache is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#7F7F7F")
MARKERS = "osD^vPX*"
FULL = "none"
LINES = 8  # the most recipes that one figure over the document shows


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
    """Perplexity and KL against the full cache, and needle recall if measured, by mean bytes."""
    recall = rows[0].protocol.needles > 0
    figure = Figure(figsize=(15 if recall else 10.5, 5), layout="constrained")
    panels = figure.subplots(1, 3 if recall else 2)
    for panel, measure in zip(panels, ("perplexity", "kl", "recall"), strict=False):
        _scatter(panel, rows, measure)
    panels[0].set_ylabel("perplexity against full cache (lower is better)")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:+g}%"))
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
    if measure == "kl":  # on a logarithmic axis; a full cache's may be 0
        return q.kl if q.kl and q.kl > 0 else None
    return q.change  # against dense on the same tokens: a baseline is scored on some of them only


def _scatter(axes: Axes, rows: Sequence[Row], measure: str) -> None:
    """One line per recipe through its budgets; what keeps no cache is a horizontal line."""
    look = _looks(rows)
    for recipe, held in _by_recipe(rows).items():
        values = [(r.bytes.mean / 1024, _value(r, measure)) for r in held]
        points = sorted((x, y) for x, y in values if y is not None)
        colour, marker = look[recipe]
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
    axes.set_xlabel("bytes of the cache, mean over the decoded tokens")
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
    budget, shown = _one_budget(rows)
    look = _looks(rows)
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for row in shown:
        s, recipe = row.series, row.subject.recipe
        style: dict[str, Any] = {"color": look[recipe][0], "label": _name(recipe), "lw": 1.5}
        if recipe == FULL:  # above the others, which may hold as many entries
            style.update(ls="--", zorder=3)
        panels[0].plot(s.seen, s.entries, **style)
        if not row.subject.baseline:
            panels[1].plot(s.seen, [n / 1024 for n in s.nbytes], **style)
        panels[2].plot(*_calm(s.seen, s.seconds), **style)
    panels[0].set_ylabel("entries per KV head")
    panels[1].set_ylabel("bytes of the cache")
    panels[1].yaxis.set_major_formatter(FuncFormatter(lambda y, _: _size(y * 1024)))
    panels[2].set_ylabel("time per token, ms (medians)")
    panels[2].set_xlabel("tokens seen")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(True, alpha=0.25)
    _legend(figure, panels[0], 105)
    at = f" at a budget of {budget}" if budget else ""
    figure.suptitle(f"Over the document{at}: {_setting(rows[0])}", fontsize=11)
    return figure


def _one_budget(rows: Sequence[Row]) -> tuple[str | None, list[Row]]:
    """Rows without a budget, and those of the budget that most rows have (the last of equals)."""
    grouped = equal.groups(rows)
    free = grouped.pop(None, [])
    if not grouped:
        return None, free[:LINES]
    most = max(len(held) for held in grouped.values())
    budget = [b for b, held in grouped.items() if len(held) == most][-1]
    return budget, [*free, *grouped[budget]][:LINES]


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


def _looks(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Recipe -> colour and marker, the same in every figure of a comparison."""
    recipes = [r for r in _by_recipe(rows) if r != FULL]
    looks = {r: (COLOURS[i % 8], MARKERS[(i + i // 8) % 8]) for i, r in enumerate(recipes)}
    return {FULL: ("black", "*"), **looks}


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
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= size:
            return f"{n / size:g} {unit}"
    return f"{n:g} B"

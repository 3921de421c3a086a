"""The four charts of KnormPress, of measured rows: six panels, a summary, the trade-off, a table.

The original takes its baseline's TTFT as a tenth of the total time and stamps the others before anything
is pruned; here every row has a full cache measured in turns with it, and keep 1.0 is the full cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvloom.evaluation import table as terminal
from kvloom.evaluation.figures import FULL
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Block, Entry, Note, Picture, Table, measured
from kvloom.evaluation.report.data import MARK, Cell, Data, Missing, called, parameter
from kvloom.evaluation.results import Row

OPTIONS = {"parameter": "what is varied, default 'keep_ratio'; the full cache counts as 1.0"}
PANELS = ("ttft", "tpot", "throughput", "ttft_change", "throughput_change", "decode_perplexity")
SUMMARY = ("ttft", "tpot", "throughput", "nbytes", "decode_perplexity")
COLUMNS = ("saving", "ttft", "tpot", "throughput", "nbytes", "decode_perplexity", "compressions")

# text -> keep -> cell; what ran otherwise than asked counts as another text
Held = dict[str, dict[float, Cell]]


def make(data: Data) -> list[Block]:
    """Raises Missing unless a text has the full cache and at least one other value."""
    held, absent = _held(data)
    title = data.figure.title
    rows = [
        row for own in held.values() for c in own.values() for row in c.rows if isinstance(row, Row)
    ]
    numbers = _table(held)
    return [
        Picture(_comprehensive(held, title), "TTFT, TPOT, throughput and perplexity by kept share", "comprehensive"),
        Picture(_summary(held, title), "all metrics as shares of the full cache's", "summary"),
        Picture(_tradeoff(held, title), "change of TTFT against change of perplexity", "tradeoff"),
        Picture(_drawn(numbers, title), "the numbers as a table", "table"),
        numbers,
        Note(
            "keep 1.0 is the full cache. Changes of TTFT and throughput are against a full cache measured in turns "
            "with each row. compressions: how often a layer pruned; 0: nothing was ever pruned."
        ),
        *([Note(f"Without a full cache that ran likewise, so not drawn: {', '.join(absent)}.")] if absent else []),
        *map(Note, terminal.busy(rows)),
    ]  # fmt: skip


def _held(data: Data) -> tuple[Held, list[str]]:
    """Texts with a full cache and others; names of what ran otherwise than asked and has no full cache."""
    name = data.option("parameter", "keep_ratio")
    found: Held = {}
    for cell in data.cells(("phase", "synthetic", "grid", "options")):
        keep = 1.0 if called(cell.spec) == FULL else parameter(cell.spec, name)
        if isinstance(keep, (int, float)) and any(isinstance(r, Row) for r in cell.rows):
            text = cell.spec.text or ""
            text = f"{text} ({MARK}{cell.changes})" if cell.changes else text
            found.setdefault(text, {})[float(keep)] = cell
    whole = {t: dict(sorted(own.items(), reverse=True)) for t, own in found.items() if 1.0 in own and len(own) > 1}  # fmt: skip
    if not whole:
        raise Missing(f"no text has rows of the full cache and of a recipe with {name}")
    left = [c.name for t, own in found.items() if t not in whole for c in own.values() if c.changes]
    return whole, left


def _keeps(held: Held) -> list[float]:
    return sorted({keep for own in held.values() for keep in own}, reverse=True)


def _comprehensive(held: Held, title: str) -> Figure:
    """Six panels; bars by kept share, a colour per text, intervals where there are repeats."""
    figure = style.new(14, 7.6)
    keeps = _keeps(held)
    width = 0.8 / len(held)
    for axes, metric in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for i, (text, own) in enumerate(held.items()):
            for keep, cell in own.items():
                found = cell.summary(metric)
                if found is None:
                    continue
                at = keeps.index(keep) + (i - (len(held) - 1) / 2) * width
                axes.bar(at, found.mean, width * 0.92, color=style.COLOURS[i], label=text)
                if found.low is not None and found.high is not None:
                    axes.plot(
                        [at, at], [found.low, found.high], color="black", lw=1, marker="_", ms=5
                    )
        axes.axhline(0, color="black", lw=0.8)
        _keep_axis(axes, keeps)
        style.metric_axis(axes, "y", metric)
    style.legend(figure, 120)
    figure.suptitle(title, fontsize=11)
    return figure


def _keep_axis(axes: Axes, keeps: Sequence[float]) -> None:
    axes.set_xticks(range(len(keeps)), [f"{k:g}" for k in keeps])
    axes.set_xlabel("kept share (1: full cache)", fontsize=9)
    axes.grid(True, axis="y", **style.GRID)
    axes.set_axisbelow(True)


def _summary(held: Held, title: str) -> Figure:
    """Each metric as a share of the full cache's, means over the texts."""
    figure = style.new(9, 4.8)
    axes = figure.subplots()
    keeps = _keeps(held)
    width = 0.8 / len(SUMMARY)
    for i, metric in enumerate(SUMMARY):
        for j, keep in enumerate(keeps):
            shares = [
                own[keep].summary(metric).mean / base.mean  # type: ignore[union-attr]
                for own in held.values()
                if keep in own and own[keep].values(metric)
                and (base := own[1.0].summary(metric)) is not None and base.mean
            ]  # fmt: skip
            if shares:
                at = j + (i - (len(SUMMARY) - 1) / 2) * width
                label = METRICS[metric].label
                axes.bar(
                    at,
                    100 * sum(shares) / len(shares),
                    width * 0.92,
                    color=style.COLOURS[i],
                    label=label,
                )
    axes.axhline(100, color="black", lw=0.9, ls="--")
    axes.set_ylabel("% of the full cache's, mean over texts", fontsize=9)
    _keep_axis(axes, keeps)
    style.legend(figure, 90)
    figure.suptitle(f"{title}: every metric against the full cache", fontsize=11)
    return figure


def _tradeoff(held: Held, title: str) -> Figure:
    figure = style.new(7, 5)
    axes = figure.subplots()
    for i, (text, own) in enumerate(held.items()):
        points = [
            (keep, cell.summary("ttft_change"), cell.summary("change"))
            for keep, cell in own.items()
            if keep != 1.0
        ]
        known = [(k, t.mean, c.mean) for k, t, c in points if t is not None and c is not None]
        look: dict[str, Any] = {"color": style.COLOURS[i], "marker": style.MARKERS[i % 8]}
        axes.plot([t for _, t, _ in known], [c for *_, c in known], ls="", ms=8, label=text, **look)
        for keep, t, c in known:
            axes.annotate(
                f"{keep:g}", (t, c), textcoords="offset points", xytext=(7, 4), fontsize=8
            )
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.margins(0.15)
    style.metric_axis(axes, "x", "ttft_change")
    style.metric_axis(axes, "y", "change")
    axes.grid(True, **style.GRID)
    style.legend(figure, 70)
    figure.suptitle(f"{title}: time to first token against perplexity, by kept share", fontsize=11)
    return figure


def _table(held: Held) -> Table:
    rows = [
        [
            Entry(text), Entry(f"{keep:g}", value=keep),
            *(measured(m, cell.summary(m), cell.keys(m)) for m in COLUMNS),
        ]
        for text, own in held.items()
        for keep, cell in own.items()
    ]  # fmt: skip
    return Table(["text", "keep", *(METRICS[m].label for m in COLUMNS)], rows, words=2)


def _drawn(table: Table, title: str) -> Figure:
    figure = style.new(13, 0.9 + 0.32 * (len(table.rows) + 1))
    axes = figure.subplots()
    axes.set_axis_off()
    drawn = axes.table(
        [[entry.text for entry in row] for row in table.rows],
        colLabels=table.columns, loc="center", cellLoc="right",
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.scale(1, 1.4)
    for (line, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("#DDDDDD")
        if line == 0:
            cell.set_text_props(weight="bold")
    figure.suptitle(title, fontsize=11)
    return figure

"""What each part is worth: differences to one recipe, paired by text, task and seed, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from kvloom.evaluation.experiment import Outcome
from kvloom.evaluation.metrics import METRICS, value
from kvloom.evaluation.report import style
from kvloom.evaluation.report.blocks import Block, Entry, Note, Picture, Table
from kvloom.evaluation.report.data import Cell, Data, Missing, called, ran
from kvloom.evaluation.report.equality import statements
from kvloom.evaluation.statistics import Summary, difference
from kvloom.evaluation.task_results import TaskRow

OPTIONS = {
    "reference": "the recipe that the others are compared to, default: the first one",
    "metric": "one or several, a panel each; default: kl, decode_perplexity, score, as far as measured",
}
DEFAULT = ("kl", "decode_perplexity", "score")
DWARFS = 20  # times the median difference
BETTER, WORSE, EVEN = "#009E73", "#D55E00", "#7F7F7F"


@dataclass(frozen=True)
class Bar:
    """A cell's difference to the reference; `keys`: of both sides' rows."""

    cell: Cell
    gain: Summary
    keys: tuple[str, ...]


def make(data: Data) -> list[Block]:
    """Raises Missing if the reference, or whatever shares a text or task with it, was not measured."""
    cells = data.subjects()
    reference = _reference(data, cells)
    panels = {}
    for name in data.names("metric", DEFAULT):
        bars = _bars(cells, reference, name)
        if bars:
            panels[name] = bars
    if not panels:
        raise Missing(
            f"nothing was measured on the same texts or tasks as the reference {reference!r}"
        )
    labels = list(dict.fromkeys(_label(b.cell) for bars in panels.values() for b in bars))
    figure = style.new(2.6 + 4.2 * len(panels), 1.4 + 0.34 * len(labels))
    drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, bars) in zip(drawn, panels.items(), strict=True):
        _draw(axes, bars, labels, name)
    figure.suptitle(f"{data.figure.title}: difference to {style.label(reference)}", fontsize=11)
    rows = [row for cell in cells for row in cell.rows]
    return [
        Picture(figure, f"differences to {reference}, with 95 % intervals"),
        _table(panels),
        Note(
            "Differences are paired by text or task, example by example where answers are; in brackets the "
            "95 % interval of a bootstrap over pairs. Green: better, orange: worse, grey: the interval holds zero, or "
            "there is one pair only."
        ),
        *map(Note, _alone(cells, panels)),
        *map(Note, statements(rows)),
    ]


def _alone(cells: Sequence[Cell], panels: dict[str, list[Bar]]) -> list[str]:
    """What ran otherwise than asked and is in no panel."""
    shown = {_label(bar.cell) for bars in panels.values() for bar in bars}
    left = [_label(c) for c in cells if c.changes and c.rows and _label(c) not in shown]
    return (
        [f"The reference did not run likewise, so not compared: {', '.join(left)}."] if left else []
    )


def _reference(data: Data, cells: Sequence[Cell]) -> str:
    """The name of the recipe to compare to."""
    asked = data.option("reference", cells[0].name)
    cells = sorted(cells, key=lambda c: bool(c.changes))  # what ran as asked first
    named = [c.name for c in cells if asked in (c.name, called(c.spec), c.spec.recipe)]
    if not named:
        raise Missing(f"no cell of the reference {asked!r}")
    return named[0]


def _bars(cells: Sequence[Cell], reference: str, name: str) -> list[Bar]:
    """Each cell against the reference at its own budget, or at the reference's only one."""
    base = [c for c in cells if c.name == reference and c.values(name)]
    bars = []
    for cell in cells:
        against = [c for c in base if c.spec.budget == cell.spec.budget] or (base if len(base) == 1 else [])  # fmt: skip
        if cell.name == reference or not against:
            continue
        pairs = _pairs(cell, against[0], name)
        if pairs:
            first, second, keys = zip(*pairs, strict=True)
            both = tuple(dict.fromkeys(k for pair in keys for k in pair))
            bars.append(Bar(cell, difference(first, second), both))
    return bars


def _pairs(cell: Cell, base: Cell, name: str) -> list[tuple[float, float, tuple[str, str]]]:
    """Values of both on the same text or task, seed and repeat, with the rows' keys."""
    others = {_place(o): o.row for o in base.outcomes if o.row is not None}
    found = []
    for outcome in cell.outcomes:
        row, other = outcome.row, others.get(_place(outcome))
        if row is None or other is None:
            continue
        keys = (row.key, other.key)
        if name == "score" and isinstance(row, TaskRow) and isinstance(other, TaskRow):
            if row.task.sha256 == other.task.sha256:
                pairs = zip(row.answers, other.answers, strict=True)
                found += [(a.score, b.score, keys) for a, b in pairs]
            continue
        first, second = value(row, name), value(other, name)
        if first is not None and second is not None:
            found.append((first, second, keys))
    return found


def _place(outcome: Outcome) -> tuple:
    spec = ran(outcome)
    options = tuple(sorted((k, repr(v)) for k, v in spec.options.items()))
    return spec.kind, spec.text, spec.task, spec.seed, spec.repeat, options


def _label(cell: Cell) -> str:
    at = f" @ {cell.spec.budget}" if cell.spec.budget else ""
    return style.label(cell.name, 70) + at


def _draw(axes: Axes, bars: Sequence[Bar], labels: Sequence[str], name: str) -> None:
    for bar in bars:
        y, gain = labels.index(_label(bar.cell)), bar.gain
        axes.barh(y, gain.mean, color=_colour(gain, name), height=0.65, zorder=2)
        if gain.low is not None and gain.high is not None:
            axes.plot(
                [gain.low, gain.high], [y, y], color="black", lw=1.3, marker="|", ms=6, zorder=3
            )
    axes.axvline(0, color="black", lw=0.9, zorder=4)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    _scale(axes, [abs(b.gain.mean) for b in bars if b.gain.mean])
    style.metric_axis(axes, "x", name)
    axes.set_xlabel(f"difference in {style.caption(METRICS[name])}", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.08)
    axes.grid(True, axis="x", **style.GRID)


def _scale(axes: Axes, sizes: Sequence[float]) -> None:
    """Logarithmic on both sides of zero where one difference would hide the others."""
    if sizes and max(sizes) > DWARFS * sorted(sizes)[len(sizes) // 2]:
        axes.set_xscale("symlog", linthresh=sorted(sizes)[len(sizes) // 2])


def _colour(gain: Summary, name: str) -> str:
    if not gain.clear:
        return EVEN
    good = gain.mean < 0 if METRICS[name].better == "lower" else gain.mean > 0
    return BETTER if good else WORSE


def _table(panels: dict[str, list[Bar]]) -> Table:
    cells = {_label(b.cell): b.cell for bars in panels.values() for b in bars}
    rows = []
    for at, cell in cells.items():
        entries = [Entry(cell.spec.budget or ""), Entry(cell.name)]
        for name, bars in panels.items():
            entries.append(_entry(next((b for b in bars if _label(b.cell) == at), None), name))
        rows.append(entries)
    heads = [f"difference in {METRICS[name].label}" for name in panels]
    return Table(["budget", "recipe", *heads], rows, 2)


def _entry(bar: Bar | None, name: str) -> Entry:
    if bar is None:
        return Entry("n/a")
    signed = METRICS[name].form.replace("{:+", "{:").replace("{:", "{:+")
    gain = bar.gain
    detail = f"{gain.count} pair{'s' if gain.count > 1 else ''}"
    if gain.low is not None and gain.high is not None:
        detail = f"[{signed.format(gain.low)}, {signed.format(gain.high)}], {detail}"
    return Entry(signed.format(gain.mean), detail, gain.mean, bar.keys)

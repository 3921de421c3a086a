"""What a kind of figure is made of, whatever it is written as: tables, pictures and sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.figure import Figure

from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.statistics import Summary


@dataclass(frozen=True)
class Entry:
    """One field of a table.

    Attributes:
        text: as shown. detail: an interval or a count, shown smaller. value: by which it is sorted; None:
            last. keys: of the rows that it comes from.
    """

    text: str
    detail: str = ""
    value: float | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Columns' names, and rows of as many entries. `words`: how many columns on the left are text.
    `folded`: the numbers of a figure, which the page shows when asked.
    """

    columns: list[str]
    rows: list[list[Entry]]
    words: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows in words. `name`: what its file is called beside others of its kind."""

    figure: Figure = field(repr=False)
    alt: str
    name: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence below a table or figure."""

    text: str


@dataclass(frozen=True)
class Markup:
    """Something of the page alone, as finished HTML; `words` stand for it elsewhere."""

    html: str
    words: str


Block = Table | Picture | Note | Markup


def measured(name: str, found: Summary | None, keys: tuple[str, ...] = ()) -> Entry:
    """A metric's mean with its deviation and interval, as an entry."""
    metric = METRICS[name]
    if found is None:
        return Entry(metric.show(None))
    text, detail = metric.show(found.mean).replace("-0.0%", "+0.0%"), ""
    varies = found.deviation is not None and found.deviation > 1e-12 * abs(found.mean)
    if varies and found.deviation is not None:
        text += f" ± {metric.show(found.deviation).lstrip('+')}"
    if found.low is not None and found.high is not None and found.high > found.low:
        detail = f"[{metric.show(found.low)}, {metric.show(found.high)}]"
    return Entry(text, detail, found.mean, keys)

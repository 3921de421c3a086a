"""Bytes retained against quality, and the front: recipes that none beats in both."""

from __future__ import annotations

from kvloom.evaluation.report import curves, style
from kvloom.evaluation.report.blocks import Block, Note, Picture
from kvloom.evaluation.report.data import Data
from kvloom.evaluation.report.equality import statements

OPTIONS = {
    "x": "a metric, default 'retained'",
    "y": "metrics, a panel each; default: kl, change, score",
}
DEFAULT = ("kl", "change", "score")


def make(data: Data) -> list[Block]:
    """Raises Missing if no quality was measured."""
    (x,) = data.names("x", ["retained"])
    panels = curves.panels(data, x, data.names("y", DEFAULT))
    looks = style.looks(data.recipes)
    figure = style.new(1.2 + 5.2 * len(panels), 5.6)
    fronts: set[tuple[str, int]] = set()
    for axes, (y, held) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):  # fmt: skip
        best = curves.front(held, y)
        fronts |= {(y, held.index(p)) for p in best}
        curves.draw(axes, held, looks, y)
        axes.plot(
            [p.x.mean for p in best], [p.y.mean for p in best], drawstyle="steps-post",
            color="black", lw=4, alpha=0.18, solid_joinstyle="miter", zorder=1, label="front",
        )  # fmt: skip
        curves.share_axis(axes, x)
    style.legend(figure, int(15 * figure.get_figwidth()))
    figure.suptitle(data.figure.title, fontsize=11)
    rows = [row for p in next(iter(panels.values())) for row in p.cell.rows]
    return [
        Picture(figure, "quality against bytes retained, and the front of recipes that none beats"),
        curves.numbers(x, panels, fronts),
        *map(Note, statements(rows)),
    ]

"""Quality against retention on a logarithmic axis: how it falls as fewer bytes stay."""

from __future__ import annotations

from kvloom.evaluation.report import curves, style
from kvloom.evaluation.report.blocks import Block, Picture
from kvloom.evaluation.report.data import Data

OPTIONS = {"y": "metrics, a panel each; default: score, decode_perplexity"}
DEFAULT = ("score", "decode_perplexity")


def make(data: Data) -> list[Block]:
    """Raises Missing if no quality was measured."""
    panels = curves.panels(data, "retained", data.names("y", DEFAULT))
    looks = style.looks(data.recipes)
    figure = style.new(1.2 + 5.2 * len(panels), 5.2)
    for axes, (y, held) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):  # fmt: skip
        curves.draw(axes, held, looks, y)
        curves.share_axis(axes, "retained")
        axes.invert_xaxis()  # from everything to little, as one reads
    style.legend(figure, int(15 * figure.get_figwidth()))
    figure.suptitle(data.figure.title, fontsize=11)
    what = "quality against the share of bytes retained, from everything on the left to little"
    return [Picture(figure, what), curves.numbers("retained", panels, set())]

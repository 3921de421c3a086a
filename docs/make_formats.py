"""Fill `docs/results/formats.md` and draw its figure from measured rows: `python docs/make_formats.py`.

The rows are those of `benchmarks/format_quality.py`. Everything between two markers of the page is
replaced; the words around them are ours.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from kvloom.core.recipe import Recipe
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Row

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "formats.md"
MODELS = {
    "formats": "testbed model",
    "formats-loud-keys": "the same function with loud key channels",
}
FAMILIES = {
    "uniform": "o", "rotated": "s", "kivi": "^", "turboquant_mse": "D", "kvquant": "v",
    "streaming_kvquant": "P",
}  # fmt: skip


def rows(folder: str) -> list[Row]:
    """The last measured row of every recipe, in the order of measuring; none if nothing was."""
    if not (RESULTS / folder).exists():
        return []
    by_recipe = {row.subject.recipe: row for row in Ledger(RESULTS / folder).rows.values()}
    return list(by_recipe.values())


def name(row: Row) -> str:
    """The recipe, calibration files by their name alone."""
    return re.sub(r"calibration='[^']*'", "calibrated", row.subject.recipe)


def page_bits(row: Row) -> tuple[float, float]:
    """Effective bits per key and value in a page, metadata included."""
    fmt = Recipe.parse(row.subject.recipe).format
    if fmt is None:
        return 16.0, 16.0
    width = row.model.head_dim
    layout = fmt.layout(width, width, torch.float16)
    return layout.bits("key", width), layout.bits("value", width)


def table(found: list[Row]) -> str:
    """Markdown."""
    if not found:
        return "Not measured yet."
    lines = [
        "| recipe | bits of a page, key / value | bits held, key / value | perplexity | KL (nats) | "
        "same first choice | needles |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        q, b = row.quality, row.bytes
        key, value = page_bits(row)
        lines.append(
            f"| `{name(row)}` | {key:.2f} / {value:.2f} | {b.avg_key_bits:.2f} / "
            f"{b.avg_value_bits:.2f} | {q.change or 0:+.2%} | {q.kl or 0:.5f} | {q.top1 or 0:.1%} | "
            f"{q.needles_right}/{q.needles} |"
        )
    return "\n".join(lines)


def family(row: Row) -> str:
    text = row.subject.recipe
    known = [f for f in FAMILIES if text.startswith(f)]
    return known[0] if known else "rotated" if "hadamard" in text else "uniform"


def draw(path: Path) -> None:
    """KL against bits, a panel per model that was measured."""
    measured = {title: rows(folder) for folder, title in MODELS.items() if rows(folder)}
    size = (5.5 * len(measured), 4.6)
    figure, grid = plt.subplots(
        1, len(measured), figsize=size, sharey=True, constrained_layout=True, squeeze=False
    )
    axes = grid[0]
    for ax, (title, found) in zip(axes, measured.items(), strict=True):
        _panel(ax, [row for row in found if Recipe.parse(row.subject.recipe).format], title)
    axes[0].set_ylabel("KL to the full cache (nats, log)")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(ax: Axes, found: list[Row], title: str) -> None:
    for kind, marker in FAMILIES.items():
        mine = [row for row in found if family(row) == kind]
        bits = [sum(page_bits(row)) / 2 for row in mine]
        ax.plot(bits, [row.quality.kl for row in mine], marker, label=kind, alpha=0.8)
    ax.set_yscale("log")
    ax.set_xlabel("effective bits per element of a page (mean of keys and values)")
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3, which="both")


def fill(text: str) -> str:
    """The page with its tables made anew."""
    for folder in MODELS:
        start, end = f"<!-- rows of {folder} -->", f"<!-- end of {folder} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n\n{table(rows(folder))}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(RESULTS / "formats.png")
    sys.exit(0)

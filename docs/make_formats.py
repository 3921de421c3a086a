"""Fill the tables of formats with measured rows, and draw their figure: `python docs/make_formats.py`.

The rows are those of `benchmarks/format_quality.py`. In `docs/results/formats.md` and
`docs/streaming-kvquant.md` everything between two markers is replaced; the words around are ours.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from kvloom.core.recipe import Recipe
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Row

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGES = (RESULTS / "formats.md", DOCS / "streaming-kvquant.md")
FIGURE = RESULTS / "formats.png"
MODELS = {
    "formats": "testbed model",
    "formats-loud-keys": "the same function with loud key channels",
}
STREAMING = "streaming"  # the marker of a table of these rows of `formats`
BESIDE_STREAMING = ("none", "int4", "int4(keys='channel', values='channel', symmetric=True)")
FAMILIES = {
    "uniform": "o", "rotated": "s", "kivi": "^", "turboquant_mse": "D", "kvquant": "v",
    "streaming_kvquant": "P",
}  # fmt: skip


def rows(folder: str) -> list[Row]:
    """The last measured row of every recipe under the newest protocol, in the order of measuring; none
    if nothing was measured.
    """
    if not (RESULTS / folder).exists():
        return []
    held = list(Ledger(RESULTS / folder).rows.values())
    newest = max(held, key=lambda row: row.measured_at).protocol if held else None
    return list({row.subject.recipe: row for row in held if row.protocol == newest}.values())


def streaming(found: list[Row]) -> list[Row]:
    """Those of streaming KVQuant, and what its page compares them with."""
    named = [row.subject.recipe for row in found]
    return [
        row
        for row, name in zip(found, named, strict=True)
        if name.startswith("streaming_kvquant") or name in BESIDE_STREAMING
    ]


def name(row: Row) -> str:
    """The recipe, calibration files by their name alone."""
    return re.sub(r"calibration='[^']*'", "calibrated", row.subject.recipe)


def page_bits(row: Row) -> tuple[float, float]:
    """Effective bits per key and value that sealed pages hold, with all scales and ids.

    What the cache holds, without its exact entries, which are in the model's dtype.
    """
    if row.counts.evicted:
        raise ValueError(f"{row.subject.recipe!r} has evicted: its exact entries are not known")
    fed = row.text.tokens - 1  # the last token is predicted only
    sealed = row.counts.sealed / (row.model.layers * row.model.kv_heads)
    exact = (fed - sealed) * {"float32": 32, "bfloat16": 16, "float16": 16}[row.model.dtype]
    key, value = ((bits * fed - exact) / sealed for bits in (row.bytes.avg_key_bits, row.bytes.avg_value_bits))  # fmt: skip
    return key, value


def noise(row: Row) -> float:
    """Standard deviation of the relative change of perplexity, estimated: sqrt(2 KL / n).

    The log ratio of two near distributions has mean KL and variance 2 KL under the first of them.
    """
    estimate: float = (2 * (row.quality.kl or 0) / row.quality.decode_scored) ** 0.5
    return estimate


def said(found: list[Row]) -> str:
    """The protocol in a sentence."""
    p, text = found[0].protocol, found[0].text
    return (
        f"{p.tokens:,} tokens of `{text.name}`, {p.prefill:,} of them at once, "
        f"{found[0].quality.decode_scored:,} decoded and scored; {p.needles} needles of {p.needle_tokens} tokens."
    )


def table(found: list[Row]) -> str:
    """Markdown."""
    if not found:
        return "Not measured yet."
    lines = [
        said(found),
        "",
        "| recipe | bits of sealed pages, key / value | bits held, key / value | 16-bit dense / held | perplexity | "
        "KL (nats) | same first choice | needles |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        q, b = row.quality, row.bytes
        key, value = page_bits(row)
        lines.append(
            f"| `{name(row)}` | {key:.2f} / {value:.2f} | {b.avg_key_bits:.2f} / "
            f"{b.avg_value_bits:.2f} | {b.dense / b.final:.2f} | {q.change or 0:+.2%} ± {noise(row):.2%} | "
            f"{q.kl or 0:.5f} | {q.top1 or 0:.1%} | {q.needles_right}/{q.needles} |"
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
    ax.set_xlabel("effective bits per element of sealed pages (mean of keys and values)")
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3, which="both")


def fill(text: str) -> str:
    """A page with its tables made anew."""
    made = {folder: rows(folder) for folder in MODELS}
    made[STREAMING] = streaming(made["formats"])
    for marker, found in made.items():
        start, end = f"<!-- rows of {marker} -->", f"<!-- end of {marker} -->"
        if start in text:
            before, rest = text.split(start)
            _, after = rest.split(end)
            text = f"{before}{start}\n\n{table(found)}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(FIGURE)
    sys.exit(0)

"""Fill the tables of formats with measured rows, and draw their figure: `python docs/make_formats.py`.

The rows are the lines that `benchmarks/format_quality.py` writes, a dict each. In
`docs/results/formats.md` and `docs/streaming-kvquant.md` everything between two markers is replaced; the
words around are ours.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGES = (RESULTS / "formats.md", DOCS / "streaming-kvquant.md")
FIGURE = RESULTS / "formats.png"
MODELS = {
    "formats": "testbed model",
    "formats-loud-keys": "the same function with loud key channels",
}
STREAMING = "streaming"  # the marker of a table of these rows of `formats`
EXPECTED = "expected"  # the marker of the table of `PAIRS`
BESIDE_STREAMING = ("none", "int4", "int4(keys='channel', values='channel', symmetric=True)")
FAMILIES = {
    "integers per token": "o", "keys per channel": "X", "rotated": "s", "kivi": "^", "turboquant_mse": "D", "kvquant": "v",
    "streaming_kvquant": "P",
}  # fmt: skip
_CALIBRATED = "kvquant(bits=2, calibrated)"
PAIRS = (  # recipe, recipe, how much more perplexity the first may have
    ("int8", "none", 0.001),
    ("streaming_kvquant", "none", 0.01),
    ("streaming_kvquant", "streaming_kvquant(mixed_precision=False)", 0.0),
    ("int4(hadamard='keys')", "kivi(bits=4)", 0.0),
    ("int4(hadamard='keys')", "kivi(bits=4, residual=0)", 0.0),
    ("int4(hadamard='keys')", "int4", 0.0),
    ("turboquant_mse(bits=2)", "kivi", 0.0),
    ("turboquant_mse(bits=2)", "kivi(residual=0)", 0.0),
    ("kivi", _CALIBRATED, 0.0),
    ("turboquant_mse(bits=2)", _CALIBRATED, 0.0),
    (_CALIBRATED, "kvquant(bits=2, outliers=0.0, calibrated)", 0.0),
    ("kvquant(bits=2, outliers=0.0, calibrated)", "int2(hadamard='both')", 0.0),
    ("int2(hadamard='both')", "int2", 0.0),
)
NOTHING = "Not measured yet."

Row = dict[str, Any]


def lines(folder: str) -> list[Row]:
    """All that was measured, in every setting."""
    path = RESULTS / folder / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def rows(folder: str) -> list[Row]:
    """The last line of every recipe in the newest setting, in the order of measuring; none if nothing
    was measured.
    """
    held = lines(folder)
    newest = max(held, key=lambda row: str(row["measured_at"]))["setting"] if held else None
    return list({name(row): row for row in held if row["setting"] == newest}.values())


def name(row: Row) -> str:
    """The recipe, calibration files by their name alone."""
    return re.sub(r"calibration='[^']*'", "calibrated", row["recipe"])


def streaming(found: list[Row]) -> list[Row]:
    """Those of streaming KVQuant, and what its page compares them with."""
    return [
        row
        for row in found
        if name(row).startswith("streaming_kvquant") or name(row) in BESIDE_STREAMING
    ]


def page_bits(row: Row) -> tuple[float, float]:
    """Effective bits per key and value that sealed pages hold, with all scales and ids.

    What the cache holds, without its exact entries, which are in the model's dtype.
    """
    if row["evicted"]:
        raise ValueError(f"{row['recipe']!r} has evicted: its exact entries are not known")
    model, setting = row["model"], row["setting"]
    fed = setting["tokens"] - 1  # the last token is predicted only
    sealed = row["sealed"] / (model["layers"] * model["kv_heads"] * setting["documents"])
    exact = (fed - sealed) * {"float32": 32, "bfloat16": 16, "float16": 16}[model["dtype"]]
    key, value = ((row[bits] * fed - exact) / sealed for bits in ("avg_key_bits", "avg_value_bits"))
    return key, value


def mean(values: list[float]) -> tuple[float, float]:
    """Mean over documents, and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def losses(row: Row, base: Row | None = None) -> tuple[float, float]:
    """Nats per token above the full cache, or above another row, over the documents."""
    return mean([a - b for a, b in zip(row["nll"], base["nll"] if base else row["dense_nll"], strict=True)])  # fmt: skip


def change(loss: tuple[float, float]) -> str:
    """A difference of losses as one of perplexities."""
    return f"{math.expm1(loss[0]):+.2%} ± {loss[1]:.2%}"


def said(found: list[Row]) -> str:
    """The setting in a sentence."""
    s, text = found[0]["setting"], found[0]["text"]
    return (
        f"{s['documents']} modules of `{text['name']}`, {s['prefill']:,} tokens of each at once, then "
        f"{found[0]['decoded']} one by one; {s['needles']} needles of {s['needle_tokens']} tokens."
    )


def table(found: list[Row]) -> str:
    """Markdown."""
    if not found:
        return NOTHING
    lines = [
        said(found),
        "",
        "| recipe | bits of sealed pages, key / value | bits held, key / value | 16-bit dense / held | perplexity | "
        "KL (nats) | same first choice | needles |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        key, value = page_bits(row)
        kl, error = mean(row["kl"])
        lines.append(
            f"| `{name(row)}` | {key:.2f} / {value:.2f} | {row['avg_key_bits']:.2f} / "
            f"{row['avg_value_bits']:.2f} | {row['dense_nbytes'] / row['nbytes']:.2f} | {change(losses(row))} | "
            f"{max(kl, 0):.5f} ± {error:.5f} | {fmean(row['top1']):.1%} | {sum(row['right'])}/{len(row['right'])} |"
        )
    return "\n".join(lines)


def expected(found: list[Row]) -> str:
    """What was expected, measured on the same documents. Markdown."""
    by_name = {name(row): row for row in found}
    lines = [
        "| expected | bits of pages | perplexity, first against second | holds | KL, first minus second | holds |",
        "| --- | ---: | ---: | --- | ---: | --- |",
    ]
    for first, second, limit in PAIRS:
        if first not in by_name or second not in by_name:
            continue
        a, b = by_name[first], by_name[second]
        bits = " and ".join(f"{fmean(page_bits(row)):.2f}" for row in (a, b) if row["sealed"])
        loss, kl = losses(a, b), mean([x - y for x, y in zip(a["kl"], b["kl"], strict=True)])
        against = f"within {limit:+.1%} of" if limit else "no worse than"
        within = _verdict(math.expm1(loss[0]) - limit, loss[1])
        by_kl = ("", "") if limit else (f"{kl[0]:+.5f} ± {kl[1]:.5f}", _verdict(*kl))
        lines.append(
            f"| `{first}` {against} `{second}` | {bits} | {change(loss)} | {within} | {by_kl[0]} | {by_kl[1]} |"
        )
    return "\n".join(lines) if len(lines) > 2 else NOTHING


def _verdict(above: float, error: float) -> str:
    """Whether a difference is at most zero, at two standard errors."""
    return "open" if abs(above) < 2 * error else "no" if above > 0 else "yes"


def family(row: Row) -> str:
    known = [f for f in FAMILIES if row["recipe"].startswith(f)]
    if known:
        return known[0]
    if "hadamard" in row["recipe"]:
        return "rotated"
    return "keys per channel" if "keys='channel'" in row["recipe"] else "integers per token"


def draw(path: Path) -> None:
    """KL against bits, a panel per model that was measured."""
    measured = {title: rows(folder) for folder, title in MODELS.items() if rows(folder)}
    size = (5.5 * len(measured), 4.6)
    figure, grid = plt.subplots(
        1, len(measured), figsize=size, sharey=True, constrained_layout=True, squeeze=False
    )
    axes = grid[0]
    for ax, (title, found) in zip(axes, measured.items(), strict=True):
        _panel(ax, [row for row in found if row["sealed"] and row["recipe"] != "none"], title)
    axes[0].set_ylabel("KL to the full cache (nats, log)")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(ax: Axes, found: list[Row], title: str) -> None:
    for kind, marker in FAMILIES.items():
        mine = [row for row in found if family(row) == kind]
        kl, error = zip(*(mean(row["kl"]) for row in mine), strict=True) if mine else ([], [])
        bits = [fmean(page_bits(row)) for row in mine]
        ax.errorbar(bits, kl, error, fmt=marker, label=kind, alpha=0.8, elinewidth=0.8)
    ax.set_yscale("log")
    ax.set_xlabel("effective bits per element of sealed pages (mean of keys and values)")
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3, which="both")


def fill(text: str) -> str:
    """A page with its tables made anew."""
    made = {folder: table(rows(folder)) for folder in MODELS}
    made[STREAMING] = table(streaming(rows("formats")))
    made |= {f"{EXPECTED} {folder}": expected(rows(folder)) for folder in MODELS}
    for marker, block in made.items():
        start, end = f"<!-- rows of {marker} -->", f"<!-- end of {marker} -->"
        if start in text:
            before, rest = text.split(start)
            _, after = rest.split(end)
            text = f"{before}{start}\n\n{block}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(FIGURE)
    sys.exit(0)

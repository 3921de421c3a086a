"""Fill `docs/results/merging.md` and draw its figures from measured rows: `python docs/make_merging.py`.

The rows are those of `benchmarks/merging.py` (paired differences) and of `benchmarks/merge_sweep.py`
(retained fractions). What stands between two markers of the page is replaced; the words are ours.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kvloom.core import registry
from kvloom.evaluation.equal import TOLERANCE
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Row

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _pages import filled
from merge_sweep import FRACTIONS
from merging import BASE, ablation_recipes, merger_recipes

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "merging.md"
SWEEP = RESULTS / "merging" / "sweep"
DRAWS = 4000  # bootstrap resamples
Cell = tuple[str, str | None]  # recipe, budget


def lines(part: str) -> list[dict[str, Any]]:
    """The last line of each recipe, budget and state of the sources, in the order of measuring."""
    path = RESULTS / "merging" / f"{part}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = {(_cell(r), r["source_sha256"]): r for r in map(json.loads, text.splitlines())}
    return list(found.values())


def _cell(row: dict[str, Any]) -> Cell:
    return row["recipe"], row["budget"]


def latest(found: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """The last of each recipe and budget; recipes as in `order`, others behind."""
    rank = {recipe: i for i, recipe in enumerate(order)}
    rows = {_cell(r): r for r in found}.values()
    return sorted(rows, key=lambda r: rank.get(r["recipe"], len(rank)))


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and the 95 % interval of a bootstrap over documents or tasks."""
    draw = random.Random(0)
    n = len(differences)
    means = sorted(fmean(draw.choices(differences, k=n)) for _ in range(DRAWS))
    return fmean(differences), means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS) - 1]


def base_of(row: dict[str, Any], found: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Of the rows of the recipe `name`, at whatever budget, the one of the same sources (if there is one)
    that holds most nearly as many bytes.
    """
    named = [r for r in found if r["recipe"] == name and r["setting"] == row["setting"]]

    def distance(r: dict[str, Any]) -> tuple[bool, float]:
        return r["source_sha256"] != row["source_sha256"], abs(_held(r) - _held(row))

    return min(named, key=distance, default=None)


def without_merger(recipe: str) -> str:
    """The same scorer and format, dropping."""
    mergers = registry.policies("merger")
    parts = [p for p in recipe.split(" | ") if p.partition("(")[0] not in mergers]
    return " | ".join(parts)


def paired_table(part: str, order: list[str], name_of: Callable[[str], str]) -> str:
    """Markdown: each recipe against the one that `name_of` names, at equal bytes; below, the sources."""
    found = lines(part)
    if not found:
        return "Not measured yet."
    out = [
        "| recipe | KiB | bytes of base | KL (nats) | KL against base | loss against base (nats) | "
        "needles | needles against base |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in latest(found, order):
        base = base_of(row, found, name_of(row["recipe"]))
        if row["budget"] is not None and base is not None:
            out.append("| " + " | ".join(_cells(row, base)) + " |")
    missing = [f"`{r}`" for r in order if r not in {row["recipe"] for row in found}]
    made = ((_cell(r), r["source_sha256"], r["commit"], [*r["kl"], *r["right"]]) for r in found)
    out += ["", sources_note(made)]
    return "\n".join(out + ([f"Not measured yet: {', '.join(missing)}."] if missing else []))


def sources_note(rows: Iterable[tuple[Cell, str, str, list[float]]]) -> str:
    """What sources the rows `(cell, hash, commit, figures)` were measured with, and how far those agree
    that were measured with several.
    """
    by_source: dict[str, list[str]] = {}
    by_cell: dict[Cell, list[list[float]]] = {}
    for cell, source, commit, figures in rows:
        by_source.setdefault(source, []).append(commit)
        by_cell.setdefault(cell, []).append(figures)
    named = [
        f"{len(commits)} at {' and '.join(dict.fromkeys(c[:7] for c in commits))} (`{source[:8]}`)"
        for source, commits in by_source.items()
    ]
    note = f"Rows by commit (hash of the sources): {', '.join(named)}."
    again = {cell: found for cell, found in by_cell.items() if len(found) > 1}
    if again:
        same = [c for c, found in again.items() if all(x == found[0] for x in found)]
        note += f" Measured with several: {len(again)}, with the same figures to the last digit: {len(same)}."
    return note


def _cells(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    budget = "" if "window_size" in row["recipe"] else f" @ {row['budget']}"
    right = f"{sum(row['right'])}/{len(row['right'])}"
    recipe = row["recipe"].replace("|", "\\|")
    first = [f"`{recipe}{budget}`", f"{_held(row) / 1024:.0f}"]
    if base is row:
        return [*first, "base", f"{fmean(row['kl']):.4f}", "", "", right, ""]
    ratio = _held(row) / _held(base)
    kl, nll, needle = (_paired(row[k], base[k]) for k in ("kl", "nll", "right"))
    shown = [_shown(*kl, 4), _shown(*nll, 4), right, _shown(*needle, 2)]
    return [*first, f"{ratio:.0%}", f"{fmean(row['kl']):.4f}", *shown]


def _held(row: dict[str, Any]) -> float:
    return fmean(row["nbytes"])


def _paired(new: list[float], old: list[float]) -> tuple[float, float, float]:
    return interval([a - b for a, b in zip(new, old, strict=True)])


def _shown(mean: float, low: float, high: float, digits: int) -> str:
    """Bold where the interval excludes zero."""
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def sweep_rows() -> list[Row]:
    """The last measured row of every recipe at every fraction."""
    found = {(r.subject.recipe, fraction(r)): r for r in all_sweep_rows()}
    return list(found.values())


def all_sweep_rows() -> list[Row]:
    """Those of every protocol and state of the sources, in the order of measuring."""
    return list(Ledger(SWEEP).rows.values()) if SWEEP.exists() else []


def share(row: Row) -> float:
    """Percent of a dense cache in the model's dtype that was held, on average over the tokens decoded."""
    b = row.bytes
    return 100 * b.compressed_mean / b.dense_mean * b.dense / b.dtype_dense


def fraction(row: Row) -> float:
    """Percent of a dense cache in the model's dtype that was asked for; budgets are against 16 bits."""
    if row.subject.budget is None:
        return 100.0
    return float(row.subject.budget.rstrip("%")) * row.bytes.dense / row.bytes.dtype_dense


def method(row: Row) -> str:
    """The recipe; mp_kvm by its centroids' share of the entries, since it has other numbers of them at
    each fraction.
    """
    number = re.fullmatch(r"mp_kvm\(max_centroids=(\d+)\)", row.subject.recipe)
    if number is None:
        return row.subject.recipe
    part = int(number[1]) / (row.protocol.tokens * fraction(row) / 100)
    return f"mp_kvm, {round(10 * part) * 10} % centroids"


def wilson(right: int, count: int) -> tuple[float, float]:
    """Where the true share lies with 95 % confidence, in percent (Wilson's interval)."""
    z = NormalDist().inv_cdf(0.975)
    whole = count + z * z
    middle = (right + z * z / 2) / whole
    reach = z * math.sqrt(right * (count - right) / count + z * z / 4) / whole
    return 100 * (middle - reach), 100 * (middle + reach)


def sweep_table() -> str:
    """Markdown: recall and perplexity of each method at each fraction, bytes and slack beside."""
    found = sweep_rows()
    if not found:
        return "Not measured yet."
    out = [
        "| fraction | recipe | held | of it without live entries | perplexity | KL (nats) | needles | 95 % |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(found, key=lambda r: (-fraction(r), r.subject.recipe)):
        b, q = row.bytes, row.quality
        off = share(row) / fraction(row) - 1
        note = f" ({off:+.0%})" if row.subject.budget and abs(off) > TOLERANCE / 2 else ""
        low, high = wilson(q.needles_right, q.needles)
        recipe = row.subject.recipe.replace("|", "\\|")
        out.append(
            f"| {fraction(row):g} % | `{recipe}` | {share(row):.2f} %{note} | "
            f"{b.slack / max(1, b.final):.0%} | {q.decode_perplexity:.2f} | {abs(q.kl or 0):.3f} | "
            f"{q.needles_right}/{q.needles} | {low:.0f} to {high:.0f} % |"
        )
    made = (
        ((r.subject.recipe, r.subject.budget), r.environment.source_sha256, r.environment.git or "",
         [r.quality.kl or 0.0, r.quality.decode_perplexity or 0.0])
        for r in all_sweep_rows()
    )  # fmt: skip
    there = {round(fraction(row), 6) for row in found}
    missing = [f"{f:g} %" for f in FRACTIONS if f not in there]
    out += ["", sources_note(made)]
    return "\n".join(out + ([f"Not measured yet: {', '.join(missing)}."] if missing else []))


def draw_sweep() -> None:
    """Recall and perplexity against the bytes really held, one line per method."""
    found = sweep_rows()
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    full = next((r for r in found if r.subject.budget is None), None)
    names = dict.fromkeys(method(r) for r in found if r.subject.budget is not None)
    colours = plt.get_cmap("tab10")
    for i, name in enumerate(names):
        mine = sorted((r for r in found if r.subject.budget and method(r) == name), key=share)
        held = [share(r) for r in mine]
        style = {
            "color": colours(i),
            "marker": "osD^vPX*"[i % 8],
            "ms": 5,
            "lw": 1.4,
            "label": name,
        }
        axes[0].plot(
            held, [100 * r.quality.needles_right / r.quality.needles for r in mine], **style
        )
        axes[1].plot(held, [r.quality.decode_perplexity for r in mine], **style)
    if full is not None and full.quality.decode_perplexity is not None:
        found_all = 100 * full.quality.needles_right / full.quality.needles
        axes[0].axhline(found_all, color="0.5", ls=":", lw=1, label="full cache")
        axes[1].axhline(full.quality.decode_perplexity, color="0.5", ls=":", lw=1)
    for ax, label in zip(axes, ("needles found (%)", "perplexity, token by token"), strict=True):
        ax.set_xscale("log")
        ax.set_xlabel("bytes held (% of a dense cache)")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes[0].plot([4], [97.5], "k*", ms=10, label="published claim for MP-KVM")
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8)
    figure.savefig(RESULTS / "merging.png", dpi=110)
    plt.close(figure)


def tables() -> dict[str, str]:
    """The page's tables by name."""
    return {
        "mergers": paired_table("mergers", merger_recipes(), without_merger),
        "ablation": paired_table("ablation", ablation_recipes(), lambda _: BASE),
        "sweep": sweep_table(),
    }


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    draw_sweep()


if __name__ == "__main__":
    main()

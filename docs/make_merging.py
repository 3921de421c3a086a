"""Fill `docs/results/merging.md` and draw its figures from measured rows: `python docs/make_merging.py`.

The rows are those of `benchmarks/merging.py` (paired differences) and of `benchmarks/merge_sweep.py`
(retained fractions). What stands between two markers of the page is replaced; the words are ours.
"""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _pages import filled
from merge_sweep import FRACTIONS
from merge_sweep import PATH as SWEEP
from merging import BASE, ablation_recipes, lines_of, merger_recipes

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "merging.md"
DRAWS = 4000  # bootstrap resamples
Cell = tuple[str, str | None]  # recipe, budget


def lines(part: str) -> list[dict[str, Any]]:
    """The last line of each recipe, budget and state of the sources, in the order of measuring."""
    rows = lines_of(RESULTS / "merging" / f"{part}.jsonl")
    return list({(_cell(r), r["source_sha256"]): r for r in rows}.values())


def _cell(row: dict[str, Any]) -> Cell:
    return row["recipe"], row["budget"]


def latest(
    found: list[dict[str, Any]], order: list[str], name_of: Callable[[str], str]
) -> list[dict[str, Any]]:
    """The last of each recipe and budget, and bases at each number of bytes that they were measured to
    hold; recipes as in `order`, others behind.
    """
    rank = {recipe: i for i, recipe in enumerate(order)}
    rows = {(_cell(r), name_of(r["recipe"]) == r["recipe"] and round(_held(r))): r for r in found}
    return sorted(rows.values(), key=lambda r: rank.get(r["recipe"], len(rank)))


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
    for row in latest(found, order, name_of):
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


def sweep_rows() -> list[dict[str, Any]]:
    """The last line of each recipe at each fraction."""
    found = {(row["recipe"], row["percent"]): row for row in lines_of(SWEEP)}
    return list(found.values())


def share(row: dict[str, Any]) -> float:
    """Percent of a dense cache in the model's dtype that was held, on average over the tokens fed singly."""
    return 100 * _held(row) / float(row["dense"])


def method(row: dict[str, Any]) -> str:
    """The recipe; mp_kvm by its centroids' share of the entries, since it has other numbers of them at
    each fraction.
    """
    number = re.fullmatch(r"mp_kvm\(max_centroids=(\d+)\)", row["recipe"])
    if number is None:
        return str(row["recipe"])
    length = row["setting"]["context"] + row["setting"]["decode"]
    part = int(number[1]) / (length * row["percent"] / 100)
    return f"mp_kvm, {round(10 * part) * 10} % centroids"


def answers(row: dict[str, Any]) -> tuple[int, int]:
    """Tasks answered, and how many there are; the first rows of the sweep do not tell which."""
    right = row.get("right")
    return (row["answered"], row["setting"]["tasks"]) if right is None else (sum(right), len(right))


def recall(row: dict[str, Any]) -> float:
    """In percent."""
    right, count = answers(row)
    return 100 * right / count


def perplexity(row: dict[str, Any]) -> float:
    """Of all documents' tokens that were fed singly."""
    return math.exp(fmean(row["nll"]))


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
        "| fraction | recipe | held | of it without live entries | documents | perplexity | KL (nats) | "
        "KL against streaming_llm | needles | 95 % |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = {row["percent"]: row for row in found if row["recipe"] == "streaming_llm"}
    for row in sorted(found, key=lambda r: (-(r["percent"] or 100), r["recipe"])):
        out.append("| " + " | ".join(_sweep_cells(row, base.get(row["percent"]))) + " |")
    made = (
        (
            (r["recipe"], str(r["percent"])),
            r["source_sha256"],
            r["commit"],
            [*r["kl"], answers(r)[0]],
        )
        for r in found
    )
    there = {row["percent"] for row in found}
    missing = [f"{f:g} %" for f in FRACTIONS if f not in there]
    out += ["", sources_note(made)]
    return "\n".join(out + ([f"Not measured yet: {', '.join(missing)}."] if missing else []))


def _sweep_cells(row: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    off = share(row) / row["percent"] - 1 if row["percent"] else 0
    note = f" ({off:+.0%})" if abs(off) > TOLERANCE / 2 else ""
    right, count = answers(row)
    low, high = wilson(right, count)
    against = ""
    if base is not None and base is not row and 1 < len(row["kl"]) == len(base["kl"]):
        against = _shown(*_paired(row["kl"], base["kl"]), 3)
    return [
        f"{row['percent'] or 100:g} %", f"`{row['recipe']}`", f"{share(row):.2f} %{note}", f"{row['slack']:.0%}", str(len(row["kl"])),
        f"{perplexity(row):.2f}", f"{abs(fmean(row['kl'])):.3f}", against, f"{right}/{count}",
        f"{low:.0f} to {high:.0f} %",
    ]  # fmt: skip


def draw_sweep() -> None:
    """Recall and perplexity against the bytes really held, one line per method."""
    found = sweep_rows()
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    full = next((row for row in found if row["percent"] is None), None)
    some = [row for row in found if row["percent"] is not None]
    colours = plt.get_cmap("tab10")
    for i, name in enumerate(dict.fromkeys(map(method, sorted(some, key=method)))):
        mine = sorted((row for row in some if method(row) == name), key=share)
        held = [share(row) for row in mine]
        style = {
            "color": colours(i), "marker": "osD^vPX*"[i % 8], "ms": 5, "lw": 1.4, "label": name
        }  # fmt: skip
        axes[0].plot(held, [recall(row) for row in mine], **style)
        axes[1].plot(held, [perplexity(row) for row in mine], **style)
    if full is not None:
        axes[0].axhline(recall(full), color="0.5", ls=":", lw=1, label="full cache")
        axes[1].axhline(perplexity(full), color="0.5", ls=":", lw=1)
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

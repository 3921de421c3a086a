"""Fill `docs/results/merging.md` and draw its figures from measured rows: `python docs/make_merging.py`.

The rows are those of `benchmarks/merging.py` (paired differences) and of `benchmarks/merge_sweep.py`
(retained fractions). What stands between two markers of the page is replaced; the words are ours.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Row

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "merging.md"
SWEEP = RESULTS / "merging" / "sweep"
DRAWS = 4000  # bootstrap resamples
DENSE = "none"


def lines(part: str) -> list[dict[str, Any]]:
    """The last line of each recipe and budget."""
    path = RESULTS / "merging" / f"{part}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = {(r["recipe"], r["budget"]): r for r in map(json.loads, text.splitlines())}
    return list(found.values())


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and the 95 % interval of a bootstrap over documents or tasks."""
    draw = random.Random(0)
    n = len(differences)
    means = sorted(fmean(draw.choices(differences, k=n)) for _ in range(DRAWS))
    return fmean(differences), means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS) - 1]


def base_of(recipe: str, held: dict[str, dict[str, Any]]) -> str:
    """The scorer alone that a recipe with a merger is compared with."""
    return recipe.partition(" | ")[0]


def paired_table(part: str, base: Any) -> str:
    """Markdown: each recipe against its base at the same budget."""
    found = lines(part)
    if not found:
        return "Not measured yet."
    out = [
        "| budget | recipe | KiB | KL (nats) | KL against base | loss against base (nats) | needles | "
        "needles against base |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for budget in dict.fromkeys(r["budget"] for r in found if r["budget"]):
        held = {r["recipe"]: r for r in found if r["budget"] == budget}
        for recipe, row in held.items():
            start = held.get(base(recipe, held))
            cells = [f"{budget}", f"`{recipe}`", f"{fmean(row['nbytes']) / 1024:.0f}",
                     f"{fmean(row['kl']):.4f}"]  # fmt: skip
            right = f"{sum(row['right'])}/{len(row['right'])}"
            if start is None or start is row:
                out.append("| " + " | ".join([*cells, "base", "base", right, "base"]) + " |")
                continue
            kl, nll, needle = (_paired(row[k], start[k]) for k in ("kl", "nll", "right"))
            shown = [_shown(*kl, 4), _shown(*nll, 4), right, _shown(*needle, 2)]
            out.append("| " + " | ".join([*cells, *shown]) + " |")
    return "\n".join(out)


def _paired(new: list[float], old: list[float]) -> tuple[float, float, float]:
    return interval([a - b for a, b in zip(new, old, strict=True)])


def _shown(mean: float, low: float, high: float, digits: int) -> str:
    """Bold where the interval excludes zero."""
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def sweep_rows() -> list[Row]:
    """The last measured row of every recipe and budget."""
    if not SWEEP.exists():
        return []
    found = {(r.subject.recipe, r.subject.budget): r for r in Ledger(SWEEP).rows.values()}
    return list(found.values())


def fraction(row: Row) -> float:
    return 100.0 if row.subject.budget is None else float(row.subject.budget.rstrip("%"))


def method(row: Row) -> str:
    """mp_kvm has another number of centroids at each fraction."""
    return row.subject.recipe.partition("max_centroids")[0].rstrip("(, ") or row.subject.recipe


def sweep_table() -> str:
    """Markdown: recall and perplexity of each method at each fraction, bytes and slack beside."""
    found = sweep_rows()
    if not found:
        return "Not measured yet."
    out = [
        "| asked for | recipe | held | of it without live entries | perplexity | KL (nats) | needles |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(found, key=lambda r: (-fraction(r), r.subject.recipe)):
        b, q = row.bytes, row.quality
        share = b.compressed_mean / b.dense_mean
        note = " (floor)" if b.allowed and b.compressed_mean > 1.02 * b.allowed else ""
        out.append(
            f"| {fraction(row):g} % | `{row.subject.recipe}` | {share:.1%}{note} | "
            f"{b.slack / max(1, b.final):.0%} | {q.decode_perplexity:.2f} | {q.kl or 0:.3f} | "
            f"{q.needles_right}/{q.needles} |"
        )
    return "\n".join(out)


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
        mine = sorted(
            (r for r in found if r.subject.budget and method(r) == name),
            key=lambda r: r.bytes.compressed_mean / r.bytes.dense_mean,
        )
        share = [100 * r.bytes.compressed_mean / r.bytes.dense_mean for r in mine]
        style = {
            "color": colours(i),
            "marker": "osD^vPX*"[i % 8],
            "ms": 5,
            "lw": 1.4,
            "label": name,
        }
        axes[0].plot(
            share, [100 * r.quality.needles_right / r.quality.needles for r in mine], **style
        )
        axes[1].plot(share, [r.quality.decode_perplexity for r in mine], **style)
    if full is not None and full.quality.decode_perplexity is not None:
        dense = 100 * full.quality.needles_right / full.quality.needles
        axes[0].axhline(dense, color="0.5", ls=":", lw=1)
        axes[1].axhline(
            full.quality.decode_perplexity, color="0.5", ls=":", lw=1, label="full cache"
        )
    for ax, label in zip(axes, ("needles found (%)", "perplexity, token by token"), strict=True):
        ax.set_xscale("log")
        ax.set_xlabel("bytes held (% of a 16-bit dense cache)")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes[0].plot([4], [97.5], "k*", ms=10, label="published claim for MP-KVM")
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8)
    figure.savefig(RESULTS / "merging.png", dpi=110)
    plt.close(figure)


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with what is between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, table in tables.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        assert mark and end, f"{PAGE} has no place for {name}"
        page = f"{before}{mark}\n{table}\n\n{end}{after}"
    return page


def main() -> None:
    tables = {
        "mergers": paired_table("mergers", base_of),
        "ablation": paired_table("ablation", lambda _, held: next(iter(held))),
        "sweep": sweep_table(),
    }
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    draw_sweep()


if __name__ == "__main__":
    main()

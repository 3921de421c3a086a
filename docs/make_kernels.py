"""Fill the tables of `docs/kernels.md` from `benchmarks/results/*.csv`: `make docs`.

To measure anew, on a quiet machine: `benchmarks/cpu_attention.py` and `benchmarks/decode.py`. The newest
row of each cell is shown.
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels.md"
START, END = "<!-- made by docs/make_kernels.py -->\n", "<!-- end -->\n"
STEP = """\
| dtype | tokens x width | recipe | MB | ms | x grouped | x `enable_gqa` | of reading | error |
|---|---:|---|---:|---:|---:|---:|---:|---:|
"""
GENERATE = """\
| tokens | recipe | MB | ms per token | `DynamicCache` | ratio |
|---:|---|---:|---:|---:|---:|
"""
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """The rows of a benchmark, oldest first."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def newest(measured: list[Row], *names: str) -> list[Row]:
    """The last row of each cell, in the order of the cells' first rows."""
    return list({tuple(row[name] for name in names): row for row in measured}.values())


def setting(measured: list[Row]) -> str:
    said = {f"{r['machine']}, {r['threads']} threads, torch {r['torch']}" for r in measured}
    commits = sorted({r["commit"] for r in measured})
    return f"{'; '.join(sorted(said))}; kvloom {', '.join(commits)}:\n\n"


def step_line(row: Row) -> str:
    rows_of = "" if row["batch"] == "1" else f"{row['batch']} rows x "
    cells = [
        row["dtype"],
        f"{rows_of}{int(row['tokens']):,} x {row['width']}",
        f"`{row['recipe']}`",
        f"{int(row['bytes']) / 1e6:.1f}",
        f"{float(row['ms']):.2f}",
        f"{float(row['x_grouped']):.2f}",
        f"{float(row['x_enable_gqa']):.1f}",
        f"{100 * float(row['of_read']):.0f} %",
        row["error"],
    ]
    return f"| {' | '.join(cells)} |\n"


def generate_line(row: Row) -> str:
    cells = [
        f"{int(row['context']):,}",
        f"`{row['recipe']}`",
        f"{int(row['nbytes']) / 1e6:.1f}",
        row["ours_ms"],
        row["dynamic_ms"],
        f"{float(row['ratio_median']):.2f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def filled(page: str, steps: list[Row], generated: list[Row]) -> str:
    """A page with everything between the two marks made anew."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    steps = newest(steps, "machine", "dtype", "tokens", "width", "batch", "recipe")
    last = generated[-1]["commit"] if generated else ""
    generated = newest([r for r in generated if r["commit"] == last], "context", "recipe")
    made = setting(steps) + STEP + "".join(map(step_line, steps)) + "\n"
    made += setting(generated) + GENERATE + "".join(map(generate_line, generated))
    return before + START + made + END + after


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(filled(text, rows("cpu_attention"), rows("decode")), encoding="utf-8")

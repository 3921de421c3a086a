"""Fill the tables of `docs/kernels.md` from `benchmarks/results/*.csv`: `make docs`.

To measure anew, on a quiet machine: `benchmarks/cpu_attention.py`, `benchmarks/decode.py`, in chunks
`benchmarks/prefill.py`, and `benchmarks/llama_cpp.py`. The newest row of each cell is shown; of decoding those
of the newest commit.
"""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels.md"
TABLES = ("cpu_attention", "decode", "prefill", "llama_cpp")
START, END = "<!-- made by docs/make_kernels.py -->\n", "<!-- end -->\n"
STEP = """\
| dtype | tokens x width | recipe | MB | ms | x grouped | x `enable_gqa` | of reading | error |
|---|---:|---|---:|---:|---:|---:|---:|---:|
"""
GENERATE = """\
| tokens | recipe | MB | ms per token | `DynamicCache` | ratio |
|---:|---|---:|---:|---:|---:|
"""
PREFILL = """\
| tokens | chunk | recipe | seconds | x `DynamicCache` |
|---:|---:|---|---:|---:|
"""
PEER = """\
| tokens | kernels | cache | MB | ms | x grouped | error |
|---:|---|---|---:|---:|---:|---:|
"""
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """The rows of a benchmark, oldest first."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def newest(measured: list[Row], *names: str) -> list[Row]:
    """The last row of each cell, in the order of the cells' first rows."""
    return list({tuple(row[name] for name in names): row for row in measured}.values())


def setting(measured: list[Row], beside: str = "") -> str:
    clocks = {"wall": "", "cpu": ", seconds of work"}
    said = {
        f"{r['machine']}, {r['threads']} thread{'s'[: r['threads'] != '1']}{clocks[r.get('clock', 'wall')]}, torch {r['torch']}"
        for r in measured
    }
    commits = sorted({r["commit"] for r in measured})
    return f"{'; '.join(sorted(said))}; kvloom {', '.join(commits)}{beside}:\n\n"


def settings(measured: list[Row]) -> list[list[Row]]:
    """Rows that were measured alike, those of the newest commit."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        alike.setdefault((row["threads"], row["clock"]), []).append(row)
    return [[r for r in some if r["commit"] == some[-1]["commit"]] for some in alike.values()]


def generate_table(measured: list[Row]) -> str:
    lines = newest(measured, "model", "context", "recipe")
    return setting(lines) + GENERATE + "".join(map(generate_line, lines))


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
    shape = "" if row["model"] == "small" else f", {row['model'].upper()}"
    stock = row["recipe"] in ("no past", "quanto 4 bits")
    cells = [
        f"{int(row['context']):,}{shape}",
        row["recipe"] if stock else f"`{row['recipe']}`".replace("|", r"\|"),
        "" if row["nbytes"] == "0" else f"{int(row['nbytes']) / 1e6:.1f}",
        f"{float(row['ours_ms']):.1f}",
        f"{float(row['dynamic_ms']):.1f}",
        f"{float(row['ratio_median']):.2f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def prefill_line(row: Row) -> str:
    cells = [
        f"{int(row['context']):,}",
        row["chunk"],
        f"`{row['recipe']}`",
        row["seconds"],
        f"{float(row['ratio_to_dynamic']):.2f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def peer_line(row: Row) -> str:
    theirs = row["backend"].startswith("ggml")
    cells = [
        f"{int(row['tokens']):,}",
        "llama.cpp" if theirs else "kvloom",
        row["cache"] if theirs else f"`{row['cache']}`",
        f"{int(row['bytes']) / 1e6:.1f}",
        f"{float(row['ms']):.2f}",
        f"{float(row['x_grouped']):.2f}",
        row["error"],
    ]
    return f"| {' | '.join(cells)} |\n"


def peer_table(measured: list[Row]) -> str:
    lines = newest(measured, "machine", "tokens", "width", "cache")
    theirs = sorted({row["backend"] for row in lines if row["backend"].startswith("ggml")})
    return setting(lines, f"; {', '.join(theirs)}") + PEER + "".join(map(peer_line, lines))


def filled(
    page: str, steps: list[Row], generated: list[Row], prefills: list[Row], peers: list[Row]
) -> str:
    """A page with everything between the two marks made anew."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    steps = newest(steps, "machine", "dtype", "tokens", "width", "batch", "recipe")
    chunked = [r for r in prefills if r["chunk"] != r["context"]]
    chunked = newest(chunked, "context", "chunk", "recipe")
    made = setting(steps) + STEP + "".join(map(step_line, steps)) + "\n"
    made += "\n".join(map(generate_table, settings(generated)))
    if chunked:
        made += "\n" + setting(chunked) + PREFILL + "".join(map(prefill_line, chunked))
    if peers:
        made += "\n" + peer_table(peers)
    return before + START + made + END + after


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(filled(text, *map(rows, TABLES)), encoding="utf-8")

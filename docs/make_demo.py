"""Fill README's table and draw its figure from `docs/results/demo.jsonl`, the demo's rows: `make docs`.

To measure anew: `kvloom demo --out FOLDER` on a quiet machine, from a clean checkout, then copy
`FOLDER/results.jsonl` here.
"""

from __future__ import annotations

from pathlib import Path

from kvloom.evaluation import equal, figures, table
from kvloom.evaluation.results import Row

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "results" / "demo.jsonl"
README = ROOT / "README.md"
FIGURE = ROOT / "docs" / "images" / "demo_quality.png"
START, END = "<!-- made by docs/make_demo.py -->\n", "<!-- end -->\n"
HEAD = """\
| recipe | budget | mean KiB | ratio | perplexity | KL | top-1 | needles | time per token |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def rows() -> list[Row]:
    """The committed rows, in the order of their measurement."""
    return [Row.from_json(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def filled(page: str, measured: list[Row]) -> str:
    """A page with everything between the two marks made anew."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    said = [*equal.remarks(measured), *table.busy(measured)]
    parts = [_setting(measured[0]), "\n\n", HEAD, *map(_line, measured), "\n"]
    parts += [f"- {remark}\n" for remark in said]
    return f"{before}{START}{''.join(parts)}{END}{after}"


def _setting(row: Row) -> str:
    m, p, e = row.model, row.protocol, row.environment
    return (
        f"{m.name}, {m.parameters / 1e6:.1f} M parameters, {m.layers} layers, {m.kv_heads} KV heads x "
        f"{m.head_dim}, {m.dtype}; {p.tokens} tokens of the standard library's sources, {p.prefill} at "
        f"once and the others\none by one; needles in {p.needle_tokens} tokens; {e.cpu} ({e.capability}), "
        f"{e.threads} thread; kvloom {e.git}:"
    )


def _line(row: Row) -> str:
    b, q, t = row.bytes, row.quality, row.timing
    cells = [
        "`" + row.subject.recipe.replace("|", r"\|") + "`",
        row.subject.budget or "",
        f"{b.mean / 1024:,.0f}",
        f"{b.ratio:.2f}x",
        f"{q.change:+.1%}".replace("%", " %").replace("-0.0", "+0.0"),
        f"{q.kl:.4f}",
        f"{q.top1:.1%}".replace("%", " %"),
        f"{q.needles_right}/{q.needles}",
        f"{t.tpot_ratio:.2f}x",
    ]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    measured = rows()
    README.write_text(filled(README.read_text(encoding="utf-8"), measured), encoding="utf-8")
    figures.quality(measured).savefig(FIGURE, dpi=110)

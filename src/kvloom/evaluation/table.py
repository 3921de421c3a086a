"""Tables for people, made from rows: quality beside bytes, and time beside the full cache's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvloom.evaluation import equal
from kvloom.evaluation.results import Row

NOTHING = "n/a"
BUSY = 1.25  # load per core from which times are called unreliable


def quality_table(rows: Sequence[Row]) -> Table:
    """Bytes and quality, grouped by budget."""
    unit, size = _unit(max(max(row.bytes.peak, row.bytes.prefill_peak) for row in rows))
    columns = [
        f"mean\n{unit}", f"peak\n{unit}", f"prefill\n{unit}", "ratio", "of\nbudget", "ppl\ndecode", "against\ndense",
        "ppl\nwhole", "KL\nnats", "top-1", "needles",
    ]  # fmt: skip
    table = _table("Bytes and quality", columns)
    for row in _grouped(table, rows):
        b, q = row.bytes, row.quality
        table.add_row(
            *_names(row),
            f"{b.mean / size:,.1f}" if b.mean else "",
            f"{b.peak / size:,.1f}" if b.peak else "",
            f"{b.prefill_peak / size:,.1f}" if b.prefill_peak else "",
            _show(b.ratio, "{:.2f}x") if b.mean else "",
            _show(equal.budget_use(row), "{:.0%}") if row.subject.budget else "",
            _show(q.decode_perplexity, "{:.3f}"),
            _show(q.change, "{:+.1%}").replace("-0.0%", "+0.0%"),
            _show(q.perplexity, "{:.3f}"),
            _show(q.kl, "{:.4f}"),
            _show(q.top1, "{:.1%}"),
            f"{q.needles_right}/{q.needles}" if q.needles else "",
        )
    return table


def time_table(rows: Sequence[Row]) -> Table:
    """Latency, throughput, and how often the cache compressed."""
    columns = [
        "TTFT\nms", "of\ndense", "TPOT\nms", "of\ndense", "p95\nms", "worst\nms", "tokens\nper s",
        "entries\nper head", "com-\npressions", "device\npeak",
    ]  # fmt: skip
    table = _table("Time", columns)
    for row in _grouped(table, rows):
        t = row.timing
        table.add_row(
            *_names(row),
            f"{t.ttft * 1e3:.1f}",
            f"{t.ttft_ratio:.2f}x",
            f"{t.tpot * 1e3:.2f}",
            f"{t.tpot_ratio:.2f}x",
            f"{t.tpot_p95 * 1e3:.2f}",
            f"{t.tpot_worst * 1e3:.2f}",
            f"{t.throughput:,.0f}",
            f"{row.series.entries[-1]:,.0f}",
            f"{row.counts.compressions:,}",
            _show(row.bytes.device_peak, "{:,}"),
        )
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """What was measured, what the columns mean, and where bytes are not equal."""
    row = rows[0]
    p, m, e = row.protocol, row.model, row.environment
    lines = [
        f"{m.name}: {m.type}, {m.parameters:,} parameters, {m.layers} layers x {m.kv_heads} KV heads "
        f"x {m.head_dim}, {m.dtype}; {row.text.name}, {p.tokens} tokens, of which {p.prefill} at once "
        f"and the others one by one; {e.device}, {e.threads} threads, {e.cpu}, {e.cores} cores.",
        "mean, peak: every live storage of the cache, over the tokens fed one by one; prefill: the peak "
        "before, one layer's new tokens uncompressed. ratio: 16-bit dense bytes / real bytes"
        + (", compressed layers only" if any(r.bytes.other_mean for r in rows) else "")
        + ". of budget: mean bytes held / allowed.",
        "ppl, KL, top-1: through the compressed cache, against a full cache reading the same tokens; "
        "decode: tokens predicted one by one, whole: all of them."
        + (" needles: planted facts found, compressed before asked." if p.needles else ""),
        "TTFT, TPOT: medians, after the commit; of dense: against a full cache measured in turns with "
        "it. compressions: summed over layers, each of which compresses by itself.",
    ]
    if m.positions is not None and p.tokens > m.positions:
        lines.append(
            f"The text is longer than the {m.positions} positions that the model was made for: only "
            "recipes with in-cache positions and recompute stay within them."
        )
    if any(r.subject.baseline for r in rows):
        lines.append(
            "recompute keeps no cache and is scored on a sample of the tokens: compare it by 'against "
            "dense', not by its perplexity."
        )
    return [*lines, *busy(rows), *equal.remarks(rows)]


def busy(rows: Sequence[Row]) -> list[str]:
    """A sentence if times are not to be relied on."""
    load, cores = max(row.timing.load or 0.0 for row in rows), rows[0].environment.cores
    if load <= BUSY * cores:
        return []
    return [
        f"The machine was busy (load up to {load:.1f} on {cores} cores): do not rely on the times."
    ]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("budget", no_wrap=True)
    table.add_column("recipe", min_width=22, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _grouped(table: Table, rows: Sequence[Row]) -> Iterator[Row]:
    """Rows by budget, with a line in the table between two budgets."""
    for held in equal.groups(rows).values():
        yield from held
        table.add_section()


def _names(row: Row) -> tuple[str, str]:
    return row.subject.budget or "", row.subject.recipe.replace("[", r"\[")


def _show(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _unit(most: float) -> tuple[str, int]:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if most >= 10 * size:
            return unit, size
    return "KiB", 1 << 10

"""A table: a row per recipe and budget, metrics measured and, beside them, as published."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.evaluation import table as terminal
from kvloom.evaluation.experiment import Claim
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report.blocks import Block, Entry, Note, Table, measured
from kvloom.evaluation.report.data import Cell, Data, facet, varying
from kvloom.evaluation.report.equality import statements
from kvloom.evaluation.results import Row

OPTIONS = {
    "columns": "names of metrics; default: quality, bytes and time as far as measured",
    "fold": "fields over which to take means as over repeats, e.g. ['text'] or ['task']",
}
TOGETHER = True
DEFAULT = (
    "score", "decode_perplexity", "change", "kl", "top1", "retained", "ratio", "nbytes", "tpot",
    "speedup",
)  # fmt: skip


def make(data: Data) -> list[Block]:
    """Raises ValueError on an unknown metric, Missing without cells."""
    cells = data.cells(data.names("fold", ()))
    columns = _columns(data, cells)
    sources: dict[str, int] = {}
    claimed = [c for c in columns if any(_claims(data, cell, c) for cell in cells)]
    facets = varying(cells)
    heads = ["budget", "recipe", *(f.removeprefix("options.") for f in facets)]
    words = len(heads)
    for name in columns:
        heads.append(METRICS[name].label)
        if name in claimed:
            heads.append(f"{METRICS[name].label}, published")
    rows = [_row(data, cell, facets, columns, claimed, sources) for cell in cells]
    blocks: list[Block] = [Table(heads, rows, words)]
    blocks += [Note(f"[{number}] {where}") for where, number in sources.items()]
    return [*blocks, *map(Note, _notes(cells))]


def _columns(data: Data, cells: Sequence[Cell]) -> list[str]:
    """What is asked for, or what there is; then what was published about these cells besides."""
    asked = data.names("columns", ())
    unknown = [name for name in asked if name not in METRICS]
    if unknown:
        raise ValueError(f"metric {unknown[0]!r}: one of {', '.join(METRICS)}")
    chosen = asked or [n for n in DEFAULT if any(cell.values(n) for cell in cells)] or ["retained"]
    published = [c.metric for cell in cells for c in data.claims(cell)]
    return list(dict.fromkeys([*chosen, *published]))


def _claims(data: Data, cell: Cell, name: str) -> list[Claim]:
    return [c for c in data.claims(cell) if c.metric == name]


def _row(
    data: Data, cell: Cell, facets: list[str], columns: list[str], claimed: list[str],
    sources: dict[str, int],
) -> list[Entry]:  # fmt: skip
    spec = cell.spec
    entries = [Entry(spec.budget or ""), Entry(cell.name)]
    entries += [Entry(facet(spec, f)) for f in facets]
    for name in columns:
        found = cell.summary(name)
        nothing = Entry(cell.failure.split(":")[0]) if cell.failure else None
        entries.append(nothing or measured(name, found, cell.keys(name)))
        if name in claimed:
            entries.append(_published(_claims(data, cell, name), name, sources))
    return entries


def _published(claims: Sequence[Claim], name: str, sources: dict[str, int]) -> Entry:
    said = [
        f"{METRICS[name].show(c.value)} [{sources.setdefault(c.where, len(sources) + 1)}]"
        for c in claims
    ]
    return Entry(", ".join(said), value=claims[0].value if claims else None)


def _notes(cells: Sequence[Cell]) -> list[str]:
    """How means came about, whether bytes are equal, whether times are to be relied on."""
    rows = [row for cell in cells for row in cell.rows]
    said = []
    repeats = {len(cell.rows) for cell in cells if cell.rows}
    if repeats - {1}:
        counts = f"{min(repeats)} to {max(repeats)}" if len(repeats) > 1 else f"{max(repeats)}"
        said.append(
            f"Means over {counts} rows ± their standard deviation; in brackets the 95 % interval of a "
            "bootstrap over rows (of task scores: over examples)."
        )
    elif any(not isinstance(row, Row) for row in rows):
        said.append("In brackets the 95 % interval of a bootstrap over examples.")
    documents = [row for row in rows if isinstance(row, Row)]
    return [*said, *statements(rows), *(terminal.busy(documents) if documents else [])]

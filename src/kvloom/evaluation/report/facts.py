"""What an experiment measured, with what, what was claimed, and what came to nothing, in words and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kvloom.evaluation import table as terminal
from kvloom.evaluation.experiment import Claim, Experiment, Figure, Outcome
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.report.blocks import Block, Entry, Note, Table, measured
from kvloom.evaluation.report.data import (
    ANALYSES,
    MARK,
    MARKED,
    Cell,
    Data,
    claimed,
    facet,
    varying,
)
from kvloom.evaluation.results import Row

SCALES = {
    "quick": " This is its quick version, which shows that it runs rather than what it finds.",
    "paper": " This is the published scale: the published models, texts and sizes.",
}


def sentences(experiment: Experiment) -> list[str]:
    """Summary, size, where it ran."""
    outcomes = experiment.outcomes
    done = [o for o in outcomes if o.row is not None]
    finished = len(done) + sum(1 for o in outcomes if o.key and o.spec.kind in ANALYSES)
    said = [experiment.summary] if experiment.summary else []
    size = f"{finished} of {len(outcomes)} cells measured"
    failed, odd = [o for o in outcomes if o.failed], [o for o in outcomes if o.fallback]
    size += f", {len(failed)} failed" if failed else ""
    size += f", {len(odd)} fell back to something smaller" if odd else ""
    scale = SCALES.get(experiment.scale, "")
    if outcomes:
        said.append(f"From {experiment.source}: {size}.{scale}")
    kinds = {o.spec.synthetic for o in outcomes}
    if True in kinds:
        said.append(
            "Data: synthetic." if kinds == {True} else "Data: some synthetic; tables say which."
        )
    return [*said, *_machines(done)]


def _machines(done: Sequence[Outcome]) -> list[str]:
    """Models, texts and machines of the rows, each once."""
    models, texts, machines = {}, {}, {}
    for outcome in done:
        row = outcome.row
        assert row is not None
        m, e = row.model, row.environment
        models[m.sha256] = (
            f"{m.name} ({m.type}, {m.parameters:,} parameters, {m.layers} layers x {m.kv_heads} KV heads x "
            f"{m.head_dim}, {m.dtype})"
        )
        if isinstance(row, Row):
            p = row.protocol
            texts[f"{row.text.name}, {p.tokens:,} tokens, the first {p.prefill:,} at once"] = True
        backend = f", {e.backend}" if e.backend else ""
        machines[
            f"{e.cpu}, {e.cores} cores, {e.threads} {'thread' if e.threads == 1 else 'threads'}, {e.device}{backend}; kvloom "
            f"{e.git or e.kvloom}, torch {e.torch}, transformers {e.transformers}"
        ] = True
    said = [f"Models: {'; '.join(models.values())}."] if models else []
    said += [f"Texts: {'; '.join(texts)}."] if 0 < len(texts) <= 6 else []
    return said + ([f"Measured on: {'; '.join(machines)}."] if machines else [])


def claims(experiment: Experiment) -> list[Block]:
    """Every published figure beside ours; without a cell that measures the same, that is said."""
    if not experiment.claims:
        return []
    rows = []
    for claim in experiment.claims:
        metric = METRICS[claim.metric]
        cells = _cells(experiment, claim)
        facets = varying(cells)
        found = [(c, s) for c in cells if (s := c.summary(claim.metric)) is not None]
        published = Entry(metric.show(claim.value), value=claim.value)
        head = [Entry(claim.recipe), Entry(claim.budget or ""), Entry(metric.label)]
        for cell, mean in found:
            ours = measured(claim.metric, mean, cell.keys(claim.metric))
            rows.append([*head, Entry(_where(cell, facets)), Entry(claim.where), published, ours])
        if not found:
            rows.append([*head, Entry(""), Entry(claim.where), published, Entry("not measured")])
    columns = ["recipe", "budget", "metric", "measured at", "published in", "published", "measured"]
    return [
        Table(columns, rows, words=5),
        Note(
            "Published figures are of the model and machine named there; ours are of this page's."
        ),
        *([Note(MARKED)] if any(MARK in row[3].text for row in rows) else []),
        *map(Note, _busy(experiment)),
    ]


def _cells(experiment: Experiment, claim: Claim) -> list[Cell]:
    """The cells that measure what was claimed, repeats together and each row once."""
    about = [o for o in experiment.outcomes if claim in claimed(experiment, o)]
    one = dataclasses.replace(experiment, outcomes=about)
    data = Data.of(one, Figure("table", "", claim.grid), Path())
    return data.cells() if data.outcomes else []


def _where(cell: Cell, facets: Sequence[str]) -> str:
    """What a cell was measured on, and in what else it differs from others of its claim."""
    spec = cell.spec
    said = [spec.budget or "", spec.text or spec.task or ""]
    if cell.changes:
        said.append(f"{MARK}{cell.changes}")
    own = [
        (f.removeprefix("options."), facet(spec, f)) for f in facets if f not in ("text", "task")
    ]
    differing = [f"{name} {value}" for name, value in own if value]
    return " · ".join(x for x in (*said, *differing) if x and x not in cell.changes.split(", "))


def _busy(experiment: Experiment) -> list[str]:
    """A warning if claims about time are measured on a machine that had other work."""
    timed = ("ttft", "tpot", "throughput", "speedup")
    rows = [o.row for o in experiment.outcomes if isinstance(o.row, Row)]
    asked = any(c.metric.startswith(timed) for c in experiment.claims)
    return terminal.busy(rows) if asked and rows else []


def trouble(experiment: Experiment) -> list[Block]:
    """Cells that failed, that are missing, and that ran otherwise than asked."""
    rows = []
    for o in experiment.outcomes:
        spec = o.spec
        if spec.kind in ANALYSES and o.key and not o.fallback:
            continue
        if o.failed:
            what = f"failed: {o.failed}"
        elif o.row is None:
            what = "not measured" if o.key is None else "its row is not in the file of rows"
        elif not o.fallback:
            continue
        else:
            what = "measured"
        changed = ", ".join(f"{k} = {v}" for k, v in (o.fallback or {}).items())
        keys = () if o.row is None else (o.row.key,)
        rows.append([
            Entry(spec.grid), Entry(spec.name or spec.recipe), Entry(spec.budget or ""), Entry(spec.text or spec.task or ""),
            Entry(changed), Entry(what, keys=keys),
        ])  # fmt: skip
    columns = ["grid", "recipe", "budget", "on", "changed so that it ran", "outcome"]
    return [Table(columns, rows, words=5)] if rows else []

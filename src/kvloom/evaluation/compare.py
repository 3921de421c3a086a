"""Cells to rows: what was measured before, what is left, and what all of them share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from kvloom import testbed
from kvloom.core.recipe import Recipe
from kvloom.evaluation import answering, disjoint, identity, matching, measure, needles, texts
from kvloom.evaluation.decoders import decoder_for
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Model, Protocol, Row
from kvloom.evaluation.subjects import Cell
from kvloom.hf import load

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TESTBED = "testbed"  # the bundled model


class Progress:
    """Told of what happens; does nothing. Subclasses show it."""

    def cell(self, cell: Cell, number: int, of: int, steps: int) -> None:
        """A cell begins that will advance by `steps`."""

    def advance(self, steps: int) -> None:
        """The cell has come this much further."""

    def done(self, cell: Cell, row: Row, fresh: bool) -> None:
        """A cell has its row; `fresh`: measured just now."""


@dataclass
class Bench:
    """Everything that the cells of one comparison share."""

    model: Any
    tokenizer: Any
    name: str
    document: texts.Document
    needles: list[answering.Asked]
    protocol: Protocol
    given_facts: Model | None = None  # of the model, if known: working them out hashes all weights

    def __post_init__(self) -> None:
        self.protocol = dataclasses.replace(
            self.protocol, needle_sha256=needles.fingerprint(self.needles)
        )
        self.model_facts = self.given_facts or identity.model_facts(self.model, self.name)
        self.environment = identity.environment(self.model.device)

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise ValueError if one of the cells cannot be measured; nothing is run."""
        for cell in cells:
            measure.check(cell.subject, cell.budget, self.protocol)
            decoder_for(self.model, cell.subject, cell.budget)
            texts = [self.document.ids, *(needle.context for needle in self.needles)]
            disjoint.check(cell.subject, self.document.name, texts)

    def key(self, cell: Cell) -> str:
        """Hash of everything that determines the cell's row."""
        return identity.cell_key(
            model=self.model_facts.sha256,
            text=self.document.facts.sha256,
            protocol=self.protocol,
            **cell.parts(self.environment),
        )

    def measure(self, cell: Cell, progress: Progress) -> Row:
        """Measure one cell."""
        start = time.perf_counter()
        ids, protocol = self.document.ids, self.protocol
        with torch.inference_mode():
            given, matched = matching.given(
                cell,
                lambda b, target: measure.probe(self.model, ids, cell.subject, b, target, protocol),
            )
            found = measure.measure(
                self.model, ids, cell.subject, given, protocol, progress.advance
            )
            right = 0
            for needle in self.needles:
                right += needles.answered(
                    self.model, self.tokenizer, cell.subject, given, needle,
                    self.protocol.prefill_chunk,
                )  # fmt: skip
                progress.advance(NEEDLE_STEPS)
        allowed = measure.allowed(cell.budget, found.bytes.dense_mean)
        quality = dataclasses.replace(found.quality, needles_right=right, needles=len(self.needles))
        return Row(
            key=self.key(cell),
            measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            took=round(time.perf_counter() - start, 3),
            model=self.model_facts,
            subject=dataclasses.replace(cell.facts, matched=matched),
            text=self.document.facts,
            protocol=self.protocol,
            environment=self.environment,
            bytes=dataclasses.replace(found.bytes, allowed=allowed),
            quality=quality,
            timing=found.timing,
            counts=found.counts,
            series=found.series,
        )


NEEDLE_STEPS = 16  # a task's weight in a progress bar, in tokens


def load_model(source: str, dtype: str, device: str) -> tuple[Any, Any]:
    """`(model, tokenizer)` by folder, hub name or `"testbed"`. Raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    load.quiet()
    folder = testbed.path() if source == TESTBED else source
    return load.pretrained(folder, DTYPES[dtype], resolve_device(device))


def resolve_device(name: str) -> torch.device:
    """A device that works; `"auto"`: an accelerator if there is one. Raises ValueError."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def prepare(source: str, text: str, protocol: Protocol, dtype: str, device: str) -> Bench:
    """Load model, text and tasks. Raises ValueError on anything that cannot be measured."""
    measure.check(Recipe(), None, protocol)
    model, tokenizer = load_model(source, dtype, device)
    document = texts.load(text, tokenizer, protocol.tokens, filler=protocol.needle_tokens)
    tasks = needles.prepare(
        document.raw, tokenizer, protocol.needles, protocol.needle_tokens, protocol.seed
    )
    return Bench(model, tokenizer, source, document, tasks, protocol)


def run(bench: Bench, cells: Sequence[Cell], ledger: Ledger, progress: Progress) -> list[Row]:
    """The cells' rows, in order; those that the ledger has are not measured again.

    Each row is on the disk before the next cell begins.
    """
    bench.check(cells)
    rows = []
    for number, cell in enumerate(cells, 1):
        known = ledger.get(bench.key(cell))
        steps = bench.protocol.tokens - 1 + NEEDLE_STEPS * len(bench.needles)
        progress.cell(cell, number, len(cells), steps)
        fresh = not isinstance(known, Row)
        row = bench.measure(cell, progress) if not isinstance(known, Row) else known
        if fresh:
            ledger.append(row)
        progress.done(cell, row, fresh=fresh)
        rows.append(row)
    return rows

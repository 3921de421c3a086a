"""Cells of a task to rows: everything that they share, their keys, and their measuring."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from kvloom.evaluation import answering, identity, matching, tasks, texts
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.measure import allowed
from kvloom.evaluation.results import Model
from kvloom.evaluation.subjects import Cell
from kvloom.evaluation.task_results import SCHEMA, VERSION, TaskFacts, TaskRow


@dataclass
class TaskBench:
    """Everything that the cells of one task share.

    Attributes:
        prepared: the task in tokens. text: names what its examples are made of. chunk: tokens per forward
            of a context, 0: one forward. model_facts: as they stand in rows.
    """

    model: Any
    tokenizer: Any
    model_facts: Model
    prepared: answering.Prepared
    text: str
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise ValueError(
                f"prefill_chunk {self.chunk}: 0 for one forward, or tokens per forward"
            )
        self.facts: TaskFacts = self.prepared.facts(self.chunk)
        self.environment = identity.environment(self.model.device)

    @property
    def steps(self) -> int:
        """How much a cell's progress advances in all: tokens of all prompts."""
        return sum(asked.tokens for asked in self.prepared.asked)

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise ValueError if one of the cells cannot be measured; nothing is run."""
        for cell in cells:
            answering.check(self.model, cell.subject, cell.budget, self.prepared, self.text)

    def key(self, cell: Cell) -> str:
        """Hash of everything that determines the cell's row."""
        return identity.cell_key(
            row=[SCHEMA, VERSION],
            model=self.model_facts.sha256,
            task=self.facts,
            ends=sorted(answering.end_tokens(self.model, self.tokenizer)),
            **cell.parts(self.environment),
        )

    def measure(self, cell: Cell, progress: Progress) -> TaskRow:
        """Measure one cell."""
        start = time.perf_counter()
        with torch.inference_mode():
            given, matched = matching.given(
                cell,
                lambda b, target: answering.probe(
                    self.model, cell.subject, b, target, self.prepared, self.chunk
                ),
            )
            held, counts, answers = answering.measure(
                self.model, self.tokenizer, cell.subject, given, self.prepared, self.chunk,
                progress.advance,
            )  # fmt: skip
        return TaskRow(
            key=self.key(cell),
            measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            took=round(time.perf_counter() - start, 3),
            model=self.model_facts,
            subject=dataclasses.replace(cell.facts, matched=matched),
            task=self.facts,
            environment=self.environment,
            bytes=dataclasses.replace(held, allowed=allowed(cell.budget, held.dense_mean)),
            counts=counts,
            answers=answers,
        )


def prepare_task(
    model: Any, tokenizer: Any, model_name: str, task_text: str, view: str = "blind", chunk: int = 0,
    filler_text_name: str = "stdlib", *, model_facts: Model | None = None,
) -> TaskBench:  # fmt: skip
    """A bench for a task named by its text.

    Args:
        task_text: e.g. `"needle(length=2048)"`. view: `"blind"` or `"sighted"`. chunk: tokens per forward
            of a context, 0: one forward. filler_text_name: text that haystacks are made of, as in
            `texts.load`; it is read if the task wants it. model_facts: of this model, if known already;
            working them out hashes all weights.

    Raises:
        ValueError: on anything that cannot be measured.
    """
    task = tasks.parse(task_text)
    filler, name = "", str(task)
    if task.filler_tokens:
        filler = texts.load(filler_text_name, tokenizer, 1, filler=task.filler_tokens).raw
        name = filler_text_name
    prepared = answering.prepare(task, tokenizer, view, filler)
    facts = model_facts or identity.model_facts(model, model_name)
    return TaskBench(model, tokenizer, facts, prepared, name, chunk)

"""One cell of an experiment: what it needs is loaded once and kept, what is known is not measured again.

Runs in the process that measures: the runner's own, a worker's, or a machine of a cluster.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvloom.core.budget import Budget
from kvloom.evaluation import compare, identity, measure, needles, texts
from kvloom.evaluation.compare import Bench
from kvloom.evaluation.experiment import Spec
from kvloom.evaluation.experiment_file import OPTIONS
from kvloom.evaluation.ledger import read_row
from kvloom.evaluation.metrics import AnyRow
from kvloom.evaluation.results import Model, Protocol
from kvloom.evaluation.subjects import Cell, parse
from kvloom.evaluation.task_bench import TaskBench, prepare_task

Fallback = dict[str, Any]
OUT_OF_MEMORY = "out of memory"
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Finished:
    """What came of a cell: `row` is None where `key` was known, or where it failed."""

    key: str | None = None
    row: AnyRow | None = None
    failed: str | None = None
    fallback: Fallback | None = None

    def to_json(self) -> str:
        """One line, to send it from one process to another."""
        row = None if self.row is None else self.row.to_json()
        return json.dumps({"key": self.key, "row": row, "failed": self.failed})

    @classmethod
    def from_json(cls, line: str) -> Finished:
        """What `to_json` wrote. Raises ValueError if it is something else."""
        given = json.loads(line)
        row = None if given["row"] is None else read_row(given["row"])
        return cls(key=given["key"], row=row, failed=given["failed"])


class Workplace:
    """Measures cells, keeping the last model and the last text or task for those that follow."""

    def __init__(self) -> None:
        self._model: tuple[Any, Any, Any, Any] = (None, None, None, None)
        self._bench: tuple[Any, Bench | TaskBench | None] = (None, None)
        self._threads = torch.get_num_threads()

    def work(
        self, spec: Spec, known: Collection[str], progress: compare.Progress | None = None
    ) -> Finished:
        """Measure a cell, unless its key is known.

        What goes wrong in one cell is its result (`failed`), so that the others go on.
        """
        told = progress or compare.Progress()
        return guarded(lambda: self._measure(spec, known, told), self.forget)

    def key(self, spec: Spec) -> str:
        """A cell's key as it is now. Raises ValueError on what cannot be measured."""
        with self.threads(spec):
            return self._bench_of(spec).key(_cell(spec))

    def forget(self) -> None:
        """Let go of model, text and tasks."""
        self._model, self._bench = (None, None, None, None), (None, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measure(self, spec: Spec, known: Collection[str], progress: compare.Progress) -> Finished:
        cell = _cell(spec)
        with self.threads(spec):
            torch.manual_seed(spec.seed)
            bench = self._bench_of(spec)
            key = bench.key(cell)
            if key in known:
                return Finished(key=key)
            bench.check([cell])
            progress.cell(cell, 1, 1, steps(spec))
            return Finished(key=key, row=bench.measure(cell, progress))

    @contextmanager
    def threads(self, spec: Spec) -> Iterator[None]:
        """With the cell's threads of torch, if it says how many."""
        torch.set_num_threads(spec.threads or self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def _bench_of(self, spec: Spec) -> Bench | TaskBench:
        wanted = (spec.kind, spec.model, spec.dtype, spec.device, spec.threads, spec.text, spec.task,
                  spec.seed, spec.repeat, sorted(spec.options.items()))  # fmt: skip
        if self._bench[0] != wanted or self._bench[1] is None:
            self._bench = (None, None)
            model, tokenizer, facts = self.model_of(spec)
            make = _document_bench if spec.kind == "document" else _task_bench
            self._bench = (wanted, make(spec, model, tokenizer, facts))
        found = self._bench[1]
        assert found is not None
        return found

    def model_of(self, spec: Spec) -> tuple[Any, Any, Model]:
        """Model, tokenizer and facts, the weights hashed once."""
        wanted = (spec.model, spec.dtype, spec.device)
        if self._model[0] != wanted:
            self.forget()  # never two models at once
            model, tokenizer = compare.load_model(spec.model, spec.dtype, spec.device)
            facts = identity.model_facts(model, spec.model)
            self._model = (wanted, model, tokenizer, facts)
        return self._model[1], self._model[2], self._model[3]


def _cell(spec: Spec) -> Cell:
    budget = None if spec.budget is None else Budget.parse(spec.budget)
    return Cell(parse(spec.recipe), budget, spec.options.get("equal_bytes", False))


def _document_bench(spec: Spec, model: Any, tokenizer: Any, facts: Model) -> Bench:
    """Repeats read other stretches of the text."""
    o = spec.options
    asked = o["needle_tokens"] or (o["tokens"] if o["needles"] else 0)
    protocol = Protocol(
        o["tokens"], o["prefill"], o["prefill_chunk"], o["prefill_runs"], o["needles"], asked,
        seed=spec.seed,
    )  # fmt: skip
    measure.check(parse("none"), None, protocol)
    assert spec.text is not None
    document = texts.load(
        spec.text, tokenizer, protocol.tokens, asked, skip=spec.repeat * protocol.tokens
    )
    tasks = needles.prepare(document.raw, tokenizer, protocol.needles, asked, protocol.seed)
    return Bench(model, tokenizer, spec.model, document, tasks, protocol, facts)


def _task_bench(spec: Spec, model: Any, tokenizer: Any, facts: Model) -> TaskBench:
    o = spec.options
    assert spec.task is not None
    return prepare_task(
        model, tokenizer, spec.model, spec.task, o["view"], o["prefill_chunk"], o["filler"],
        model_facts=facts,
    )  # fmt: skip


def changed(spec: Spec, fallback: Fallback | None) -> Spec:
    """A cell with what a fallback replaces: fields, or options of its kind."""
    if not fallback:
        return spec
    fields = {f.name for f in dataclasses.fields(Spec)}
    own = {k: v for k, v in fallback.items() if k in fields}
    options = {k: v for k, v in fallback.items() if k in OPTIONS[spec.kind]}
    return dataclasses.replace(spec, **own, options=spec.options | options)


def steps(spec: Spec) -> int:
    """A cell's weight in a progress bar, in tokens."""
    o = spec.options
    if spec.kind == "document":
        return int(o["tokens"] - 1 + compare.NEEDLE_STEPS * o["needles"])
    return 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _WORDS)


def with_fallbacks(
    spec: Spec, fallbacks: list[Fallback], work: Callable[[Spec], Finished], start: int = 0
) -> Finished:
    """What comes of a cell; while memory runs out, of the cell as each fallback changes it.

    `start`: how many attempts have been made elsewhere already.
    """
    done = Finished(failed=OUT_OF_MEMORY)
    for fallback in [None, *fallbacks][start:]:
        done = dataclasses.replace(work(changed(spec, fallback)), fallback=fallback)
        if not out_of_memory(done):
            break
    return done


def out_of_memory(done: Finished) -> bool:
    """Whether that is why a cell has no row."""
    return (done.failed or "").startswith(OUT_OF_MEMORY)


def guarded(measure: Callable[[], Finished], forget: Callable[[], None]) -> Finished:
    """What `measure` gives; what goes wrong in it is the cell's result, so that the others go on."""
    try:
        return measure()
    except (ValueError, TypeError, OSError) as error:  # wrong input, as everywhere in kvloom
        return Finished(failed=" ".join(str(error).split()))
    except Exception as error:
        failed = f"{type(error).__name__}: {_words(error)}"
        if is_out_of_memory(error):
            failed = f"{OUT_OF_MEMORY}: {_words(error)}"
        else:
            traceback.print_exc()
    forget()  # now that no traceback holds the tensors any more
    return Finished(failed=failed)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

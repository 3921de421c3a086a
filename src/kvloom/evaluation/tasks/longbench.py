"""LongBench: its 16 English and code tasks.

Source: Bai et al., "LongBench" (arXiv:2308.14508): lengths of answers, truncation in the middle, and metrics
are as in its `dataset2maxlen.json`, `pred.py` and `eval.py`; data and the official prompts are read from where
the user has them. A score is 0 to 1 here, the best over the accepted answers; the paper's is 100 times that.

Deviations: without the official `dataset2prompt.json` the wording is our own, and the row says so; no chat
template; the middle that is left out is cut between characters, so that what stays has as many tokens as asked
for, where LongBench cuts tokens and decodes them; answers to `trec` and `triviaqa` end with their first line,
which is all that is scored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvloom.evaluation.subjects import file_sha256
from kvloom.evaluation.tasks import _records, scoring
from kvloom.evaluation.tasks._build import cut_middle
from kvloom.evaluation.tasks._longbench import KINDS, PROMPTS, Kind
from kvloom.evaluation.tasks.base import LEAST, Example, Measure, Task, parameter


@dataclass(frozen=True)
class LongBench(Task):
    """One of the tasks, e.g. `longbench(task='hotpotqa', path='data/hotpotqa.jsonl', length=3500)`.

    Attributes:
        task: its id. path: LongBench's `.jsonl` (or `.xz`, `.gz`) of it, the folder that they are all in, a
            file of prompts that are written out, of several tasks (MiniLongBench), or a dataset of the hub
            (`"THUDM/LongBench"`). length: tokens of a prompt at most; more are cut out of its middle; None:
            as it is. prompts: the official `dataset2prompt.json`; None: our own wording. examples: how many;
            None: all. seed: of which, if not all.
    """

    name = "longbench"
    family = "longbench"

    task: str = field(metadata={"choices": tuple(KINDS)})
    path: str
    length: int | None = parameter(None, least=LEAST)
    prompts: str | None = None
    examples: int | None = parameter(None, least=1)
    seed: int = parameter(0, least=0)

    @property
    def kind(self) -> Kind:
        """How the task is answered and scored."""
        return KINDS[self.task]

    @property
    def metric(self) -> str:  # type: ignore[override]
        """See `Task`; each of the 16 has its own."""
        return self.kind.metric

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        return _records.choose(
            self._all(), self.examples, self.seed, lambda record: self._example(record, measure)
        )

    def _all(self) -> list[_records.Record]:
        if not _records.is_local(self.path):
            return _records.hub(self.path, self.task)
        file = Path(self.path)
        path = str(file / f"{self.task}.jsonl") if file.is_dir() else self.path
        own = (self.task, f"{self.task}_e")  # LongBench-E's have the same questions
        found = [r for r in _records.read(path) if r.get("task", r.get("dataset", own[0])) in own]
        if not found:
            raise ValueError(f"{self}: {path!r} has no record of this task")
        return found

    def _example(self, record: _records.Record, measure: Measure) -> Example:
        context, question = self._prompt(record)
        if self.length is not None:
            context, question = cut_middle(context, question, self.length - 1, measure)
        answers = tuple(map(str, _records.field(record, "answers", self.path)))
        classes = tuple(record.get("all_classes") or ())
        if self.kind.metric == "classification" and not classes:
            raise ValueError(f"{self}: a record has no 'all_classes' to choose from")
        stop: Literal["line"] | None = "line" if self.kind.first_line else None
        return Example(
            context, question, answers, self.kind.new_tokens, stop=stop, classes=classes
        )  # fmt: skip

    def _prompt(self, record: _records.Record) -> tuple[str, str]:
        """Context with what is said before it, and what is said after it."""
        if "context_prompt" in record:
            if self.prompts is not None:
                raise ValueError(
                    f"{self}: the prompts in this file are written out already; leave prompts out"
                )
            question = _records.field(record, "question_prompt", self.path)
            return str(record["context_prompt"]), str(question)
        before, mark, after = self._template().partition("{context}")
        if not mark or not after:
            raise ValueError(f"{self}: its prompt lacks {{context}}, or has nothing after it")
        given = str(_records.field(record, "input", self.path))
        text = str(_records.field(record, "context", self.path))
        return before.replace("{input}", given) + text, after.replace("{input}", given)

    def _template(self) -> str:
        if self.prompts is None:
            return PROMPTS[self.task]
        try:
            found = json.loads(Path(self.prompts).read_text(encoding="utf-8"))[self.task]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"prompts {self.prompts!r}: a JSON file with a prompt for {self.task!r} was expected "
                f"({type(error).__name__}: {error})"
            ) from None
        return str(found)

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        said = scoring.first_line(generated) if self.kind.first_line else generated
        if self.kind.metric == "classification":
            return max(
                scoring.classification(said, answer, example.classes) for answer in example.answers
            )
        return max(self.kind.score(said, answer) for answer in example.answers)

    @property
    def wording(self) -> str:
        """See `Task`."""
        if self.prompts is not None:
            return file_sha256(self.prompts)
        local = _records.is_local(self.path) and not Path(self.path).is_dir()
        written = local and any("context_prompt" in r for r in self._all())
        return file_sha256(self.path) if written else "kvloom"

"""The row of a task: what a model answered through a cache, example by example.

Its file and its conventions are those of `results`; a folder's rows are of both kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.evaluation.results import Counts, Environment, Model, Subject, from_line, to_line

SCHEMA = "kvloom.task"
VERSION = 1


@dataclass(frozen=True)
class TaskFacts:
    """What was asked.

    Attributes:
        task: the text that names it with every parameter, e.g. `"needle(length=2048, depth=0.5)"`.
        family: e.g. `"ruler"`. metric: how an answer is scored. sha256: of all examples' token ids and
            accepted answers. examples: how many. tokens: mean length of context and question.
        prompts: whose wording, `"kvloom"` or `"sha256:..."` of the file that gave it.
        view: `"blind"`: the context is compressed before the question is seen; `"sighted"`: the
            question is in view.
        prefill_chunk: tokens per forward of the context, 0: one forward.
    """

    task: str
    family: str
    metric: str
    sha256: str
    examples: int
    tokens: float
    prompts: str
    view: str
    prefill_chunk: int


@dataclass(frozen=True)
class Held:
    """Live bytes of the cache, means over the examples, after the context was compressed and before
    anything else was fed (with the question in view: after both).

    Attributes:
        mean: all of it. other_mean: part of it in layers that kvloom does not compress. dense_mean: a
            16-bit dense cache of the compressed layers. allowed: by the budget; None where it is not in
            bytes. floor: the least that the recipe needs. peak: most at any example's end.
    """

    mean: float
    other_mean: float
    dense_mean: float
    allowed: float | None
    floor: int
    peak: int

    @property
    def compressed_mean(self) -> float:
        """`mean` of the compressed layers alone."""
        return self.mean - self.other_mean

    @property
    def ratio(self) -> float | None:
        """16-bit dense bytes / real bytes of the compressed layers."""
        return self.dense_mean / self.compressed_mean if self.compressed_mean else None


@dataclass(frozen=True)
class Answer:
    """One example.

    Attributes:
        score: 0 to 1. generated: what the model wrote. expected: the accepted answers. tokens: of context
            and question. depth: where in the context the answer stands, 0 to 1, if it is at one place.
    """

    score: float
    generated: str
    expected: list[str]
    tokens: int
    depth: float | None


@dataclass(frozen=True)
class TaskRow:
    """One measured task. `key` is the hash of everything that determines it."""

    key: str
    measured_at: str
    took: float
    model: Model
    subject: Subject
    task: TaskFacts
    environment: Environment
    bytes: Held
    counts: Counts
    answers: list[Answer]

    @property
    def score(self) -> float:
        """Mean over the examples, 0 to 1."""
        return sum(a.score for a in self.answers) / len(self.answers)

    def to_json(self) -> str:
        """One line; see `results.to_line`."""
        return to_line(self, SCHEMA, VERSION)

    @classmethod
    def from_json(cls, line: str) -> TaskRow:
        """Read a line. Raises ValueError if it is of another schema or version, or lacks a field."""
        row: TaskRow = from_line(cls, line, SCHEMA, VERSION)
        return row

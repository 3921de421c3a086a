"""Line retrieval: a record of lines, one of which is asked for by its name.

Source: Li et al., "How long can open-source LLMs truly promise on context length?" (LongChat, 2023). The
lines are its format; generated ones have our own wording around them. Deviation: the first number of an
answer counts, where LongChat takes the last, since models that are not tuned to chat write on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvloom.evaluation.subjects import file_sha256
from kvloom.evaluation.tasks import _records, scoring
from kvloom.evaluation.tasks._build import NAMES, fit_count, lines_of, names, prompt_tokens
from kvloom.evaluation.tasks.base import (
    LEAST,
    Example,
    Measure,
    Task,
    new_tokens,
    parameter,
    spread,
)

NEW_TOKENS = 35  # chat models begin with words
END = "\nNow the record is over."  # of the lines, in LongChat's prompts
INTRO = (
    "This is a record of lines. Each has a name and a number, its REGISTER_CONTENT; one of them will be "
    "asked for.\n\n"
)
QUESTION = (
    "\nThis was the record. What is the REGISTER_CONTENT of line {name}?\n"
    "line {name}: REGISTER_CONTENT is <"
)


@dataclass(frozen=True)
class Lines(Task):
    """`line river-lamp: REGISTER_CONTENT is <4321>`, and so on.

    Attributes:
        length: tokens of a prompt at most; generated ones have at most as many lines as there are names (3500),
            however long they may be. depth: where the asked line stands; None: spread evenly over the
            examples. path: None: generated; LongChat's `.jsonl` (or `.xz`, `.gz`), whose prompts of at most
            `length` tokens are taken, of `lines` lines if it says how many. examples: how many, if a file has as
            many. seed: of
            lines, or of which prompts.
    """

    name = "lines"
    family = "lines"
    metric = "first number"

    length: int = parameter(2048, least=LEAST)
    depth: float | None = parameter(None, most=1)
    path: str | None = None
    lines: int | None = parameter(None, least=1)
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.lines is not None:
            raise ValueError(
                f"{self}: lines says which prompts of a file are taken; give a path, or length"
            )
        if self.path is not None and self.depth is not None:
            raise ValueError(
                f"{self}: depth is of generated lines; those of a file stand where they do"
            )

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        if self.path is not None:
            return self._read(self.path, measure)
        return [self._generated(i, measure) for i in range(self.examples)]

    def _generated(self, i: int, measure: Measure) -> Example:
        depth = spread(i, self.examples) if self.depth is None else self.depth

        def record(count: int) -> tuple[str, str, str]:
            rng = random.Random(f"{self.name} {self.seed} {i}")
            named = names(rng, count)
            values = [str(rng.randint(1, 50000)) for _ in named]
            said = [
                f"line {n}: REGISTER_CONTENT is <{v}>" for n, v in zip(named, values, strict=True)
            ]
            at = round(depth * (count - 1))
            return INTRO + lines_of(said), QUESTION.format(name=named[at]), values[at]

        def size(count: int) -> int:
            return prompt_tokens(measure, *record(count)[:2])

        count = fit_count(size, self.length, most=NAMES)
        context, question, value = record(count)
        where = round(depth * (count - 1)) / max(1, count - 1)
        return Example(context, question, (value,), new_tokens(measure, value), where)

    def _read(self, path: str, measure: Measure) -> list[Example]:
        records = [
            r for r in _records.read(path)
            if self.lines is None or _records.field(r, "num_lines", path) == self.lines
        ]  # fmt: skip
        sizes: list[int] = []

        def fitting(record: _records.Record) -> Example | None:
            example = _example(record, path, measure)
            sizes.append(prompt_tokens(measure, example.context, example.question))
            return example if sizes[-1] <= self.length else None

        made = _records.choose(records, self.examples, self.seed, fitting)
        if not made:
            least = f"; the shortest has {min(sizes)}" if sizes else ""
            raise ValueError(f"{self}: no such prompt has at most {self.length} tokens{least}")
        return made

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        said = scoring.numbers(generated)
        return float(bool(said) and said[0] == float(example.answers[0]))

    @property
    def wording(self) -> str:
        """See `Task`; a file of prompts has its own wording."""
        return "kvloom" if self.path is None else file_sha256(self.path)


def _example(record: _records.Record, path: str, measure: Measure) -> Example:
    prompt = str(_records.field(record, "prompt", path))
    at = prompt.rfind(END)
    if at < 1:
        raise ValueError(f"data {path!r}: a prompt lacks {END!r}, where its lines end")
    value = str(_records.field(record, "expected_number", path))
    _, index = _records.field(record, "random_idx", path)
    depth = index / max(1, _records.field(record, "num_lines", path) - 1)
    new = max(NEW_TOKENS, new_tokens(measure, value))
    return Example(prompt[:at], prompt[at:], (value,), new, depth)

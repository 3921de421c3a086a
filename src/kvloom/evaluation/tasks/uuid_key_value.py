"""Key-value retrieval of UUIDs: a JSON object, one value of which is asked for.

Source: Liu et al., "Lost in the middle" (arXiv:2307.03172), its synthetic task, generated here or read from
its files. Scored as there: whether the value occurs. Deviation: our own wording, which leads up to the value.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.evaluation.tasks import _records, scoring
from kvloom.evaluation.tasks._build import fit_count, prompt_tokens, uuid
from kvloom.evaluation.tasks.base import (
    LEAST,
    Example,
    Measure,
    Task,
    new_tokens,
    parameter,
    spread,
)

INTRO = "This JSON object holds values by key; one of them will be asked for.\n\n"
QUESTION = '\n\nThe value of the key "{key}" is: "'

Pairs = Sequence[Sequence[str]]


@dataclass(frozen=True)
class UuidKeyValue(Task):
    """`{"a54e2eed-...": "d1ff29be-...", ...}`.

    Attributes:
        length: tokens of a prompt at most. depth: where the asked pair stands; None: spread evenly over the
            examples, or where a file has it. path: None: generated; the paper's `.jsonl` (or `.gz`, `.xz`),
            whose objects of at most `length` tokens are taken. examples: how many, if a file has as
            many. seed: of all pairs, or of which objects.
    """

    name = "uuid_key_value"
    family = "key_value"
    metric = "contained"

    length: int = parameter(4096, least=LEAST)
    depth: float | None = parameter(None, most=1)
    path: str | None = None
    examples: int = parameter(8, least=1)
    seed: int = parameter(0, least=0)

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        if self.path is not None:
            return self._read(self.path, measure)
        return [self._generated(i, measure) for i in range(self.examples)]

    def _generated(self, i: int, measure: Measure) -> Example:
        depth = spread(i, self.examples) if self.depth is None else self.depth

        def example(count: int) -> Example:
            rng = random.Random(f"{self.name} {self.seed} {i}")
            pairs = [(uuid(rng), uuid(rng)) for _ in range(count)]
            return _example(pairs, round(depth * (count - 1)), measure)

        return example(fit_count(lambda n: _size(example(n), measure), self.length))

    def _read(self, path: str, measure: Measure) -> list[Example]:
        sizes: list[int] = []

        def fitting(record: _records.Record) -> Example | None:
            example = self._of_record(record, path, measure)
            sizes.append(_size(example, measure))
            return example if sizes[-1] <= self.length else None

        made = _records.choose(_records.read(path), self.examples, self.seed, fitting)
        if not made:
            raise ValueError(
                f"{self}: no object has at most {self.length} tokens; the shortest has {min(sizes)}"
            )
        return made

    def _of_record(self, record: _records.Record, path: str, measure: Measure) -> Example:
        pairs = list(_records.field(record, "ordered_kv_records", path))
        asked = [_records.field(record, "key", path), _records.field(record, "value", path)]
        if asked not in pairs:
            raise ValueError(f"data {path!r}: an object lacks the pair that is asked for")
        at = pairs.index(asked)
        if self.depth is not None:
            del pairs[at]
            at = round(self.depth * len(pairs))
            pairs.insert(at, asked)
        return _example(pairs, at, measure)

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        return scoring.contained(generated, example.answers)


def _example(pairs: Pairs, at: int, measure: Measure) -> Example:
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
    key, value = pairs[at]
    context, question = f"{INTRO}{{{lines}}}", QUESTION.format(key=key)
    return Example(
        context, question, (value,), new_tokens(measure, value), at / max(1, len(pairs) - 1)
    )


def _size(example: Example, measure: Measure) -> int:
    return prompt_tokens(measure, example.context, example.question)

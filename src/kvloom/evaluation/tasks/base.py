"""What a task is: a frozen dataclass of parameters that makes examples and scores answers."""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Measure = Callable[[str], int]  # tokens of a text, special ones left out

SPARE = 3  # tokens generated beyond the answer's own, since a tokenizer may split it otherwise
LEAST = 64  # tokens of a prompt: room for a planted fact and its question


@dataclass(frozen=True)
class Example:
    """One question about one context.

    Attributes:
        context: what is compressed; never empty. question: follows it at once, and leads up to the
            answer. answers: accepted ones, or all that are asked for, as the task scores them.
        max_new_tokens: generation ends there at the latest. depth: where the answer stands in the
            context, 0 to 1, if it is at one place. stop: `"line"`: generation ends with the first line
            that is not empty. classes: what a classification chooses from.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    depth: float | None = None
    stop: Literal["line"] | None = None
    classes: tuple[str, ...] = ()


def parameter(default: Any, **rule: Any) -> Any:
    """A field with a rule: `least`, `most` or `choices`."""
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class Task(ABC):
    """A task; its parameters are the dataclass's fields, its text is `str(task)`.

    Raises ValueError, on construction, if a parameter is of another type than annotated, or breaks its
    rule (see `parameter`).

    Attributes:
        name: as in its text. family: of tasks that belong together. metric: how an answer is scored.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    metric: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not _is_of(value, hints[f.name]):
                raise ValueError(f"{self}: {f.name} must be {_words(hints[f.name])}, not {value!r}")
            broken = None if value is None else _broken(value, f.metadata)
            if broken:
                raise ValueError(f"{self}: {f.name} must be {broken}, not {value!r}")

    @abstractmethod
    def make(self, measure: Measure, filler: str) -> list[Example]:
        """The examples; the same parameters and filler give the same ones.

        Args:
            measure: counts tokens. filler: raw text of at least `filler_tokens` tokens.

        Raises:
            ValueError: where the parameters leave no room, or the filler is too short.
        """

    @abstractmethod
    def score(self, example: Example, generated: str) -> float:
        """How good an answer is, 0 to 1."""

    @property
    def wording(self) -> str:
        """Whose wording: `"kvloom"`, or `"sha256:..."` of the file that gave it."""
        return "kvloom"

    @property
    def filler_tokens(self) -> int:
        """How many tokens of other text the task is made of; 0: none."""
        return 0

    def __str__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({', '.join(given)})"


def _kinds(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return bool in _kinds(kind)
    numbers = (int, float)
    return any(isinstance(value, numbers if k is float else k) for k in _kinds(kind))


def _words(kind: Any) -> str:
    return " or ".join("None" if k is type(None) else str(k.__name__) for k in _kinds(kind))


def _broken(value: Any, rule: Any) -> str | None:
    """What `value` should have been, if it breaks its rule."""
    if "choices" in rule and value not in rule["choices"]:
        return f"one of {', '.join(map(repr, rule['choices']))}"
    if "least" in rule and value < rule["least"]:
        return f"at least {rule['least']}"
    if "most" in rule and not 0 <= value <= rule["most"]:
        return f"between 0 and {rule['most']}"
    return None


def spread(i: int, count: int) -> float:
    """The `i`-th of `count` depths that are spread evenly."""
    return (i + 0.5) / count


def new_tokens(measure: Measure, answer: str) -> int:
    """How many tokens an answer may take."""
    return measure(" " + answer) + SPARE

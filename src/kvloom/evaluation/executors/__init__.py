"""Where cells are measured: in this process, in others on this machine, or on a Ray cluster.

An executor is a function that takes cells and yields what came of them, in any order. Only the runner
writes rows, so a killed executor loses the cells in flight and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from kvloom.evaluation.cells import Fallback, Finished
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.experiment import Spec


@dataclass
class Order:
    """What is to be done.

    Attributes:
        specs: by their number. fallbacks: for when memory runs out. known: keys of finished rows; the
            runner adds to it while the executor runs.
        workers: at most so many at once; None: as many as there is room for. progress: within a cell,
            where the executor sees it.
    """

    specs: dict[int, Spec]
    fallbacks: list[Fallback]
    known: Collection[str]
    workers: int | None
    progress: Progress


class Executor(Protocol):
    """Yields `(number, Finished)` for each cell of an order."""

    def __call__(self, order: Order, /) -> Iterator[tuple[int, Finished]]: ...


def executor(name: str) -> Callable[[Order], Iterator[tuple[int, Finished]]]:
    """`inline`, `process` or `ray`. Raises ValueError on another name, or if ray is not installed."""
    if name == "inline":
        from kvloom.evaluation.executors.inline import run
    elif name == "process":
        from kvloom.evaluation.executors.process import run
    elif name == "ray":
        from kvloom.evaluation.executors.ray import run
    else:
        raise ValueError(f"executor {name!r}: one of inline, process, ray")
    return run

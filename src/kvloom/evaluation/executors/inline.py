"""Cells one after the other in this process, with progress within each."""

from __future__ import annotations

from collections.abc import Iterator

from kvloom.evaluation.cells import Finished, Workplace, with_fallbacks
from kvloom.evaluation.executors import Order


def run(order: Order) -> Iterator[tuple[int, Finished]]:
    """See `Executor`."""
    place = Workplace()
    for number, spec in order.specs.items():
        yield (
            number,
            with_fallbacks(
                spec, order.fallbacks, lambda s: place.work(s, order.known, order.progress)
            ),
        )

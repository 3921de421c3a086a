"""The stream of batches: made in place, or ahead of time by worker processes for a fast GPU."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from training import corpus
from training.config import Recipe
from training.corpus import Corpus
from training.mixture import Batch, Mixture

AHEAD = 4
_mixture: Mixture


def batches(
    data: Corpus, recipe: Recipe, step: int, tokens: int, texts: Path, out: Path
) -> Iterator[Batch]:
    """Batches from ``step`` on to the end of the schedule, in order."""
    if not recipe.workers:
        mixture = Mixture(data, recipe)
        yield from (mixture.batch(*place) for place in schedule(recipe, step, tokens))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(recipe.workers, _start, (texts, out, recipe)) as pool:
        pending: deque = deque()
        for place in schedule(recipe, step, tokens):
            pending.append(pool.apply_async(_make, place))
            if len(pending) > AHEAD * recipe.workers:
                yield pending.popleft().get()
        while pending:
            yield pending.popleft().get()


def schedule(recipe: Recipe, step: int, tokens: int) -> Iterator[tuple[int, int]]:
    """(step, tokens seen before it) up to the recipe's total."""
    while tokens < recipe.total:
        yield step, tokens
        tokens += recipe.stage(tokens).batch_tokens
        step += 1


def _start(texts: Path, out: Path, recipe: Recipe) -> None:
    global _mixture
    _mixture = Mixture(corpus.prepare(texts, out / "data", recipe.model.vocab), recipe)


def _make(step: int, tokens: int) -> Batch:
    return _mixture.batch(step, tokens)

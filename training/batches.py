"""The stream of batches: made in place, or ahead of time by worker processes for a fast GPU."""

from __future__ import annotations

import math
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
    data: Corpus, recipe: Recipe, step: int, tokens: int, until: float, texts: Path, out: Path
) -> Iterator[Batch]:
    """Batches from ``step`` on until ``until`` tokens were seen, in order."""
    if not recipe.workers:
        mixture = Mixture(data, recipe)
        yield from (mixture.batch(*place) for place in schedule(recipe, step, tokens, until))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(recipe.workers, _start, (texts, out, recipe)) as pool:
        pending: deque = deque()
        for place in schedule(recipe, step, tokens, until):
            pending.append(pool.apply_async(_make, place))
            if len(pending) > AHEAD * recipe.workers:
                yield pending.popleft().get()
        while pending:
            yield pending.popleft().get()


def schedule(
    recipe: Recipe, step: int, tokens: int, until: float = math.inf
) -> Iterator[tuple[int, int]]:
    """(step, tokens seen before it) up to ``until`` or the recipe's total, whichever is less."""
    while tokens < min(recipe.total, until):
        yield step, tokens
        tokens += recipe.stage(tokens).batch_tokens
        step += 1


def _start(texts: Path, out: Path, recipe: Recipe) -> None:
    global _mixture
    _mixture = Mixture(corpus.prepare(texts, out / "data", recipe.model.vocab), recipe)


def _make(step: int, tokens: int) -> Batch:
    return _mixture.batch(step, tokens)

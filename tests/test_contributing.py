"""The worked example of CONTRIBUTING.md, as it stands there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom import CompressedCache, register
from kvloom.core import registry
from kvloom.core.entries import Entries
from kvloom.core.policy import Scorer, check
from tests import models


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """Largest values, and a recent window.

    Attributes:
        sinks: first tokens of each row, pinned. recent: newest entries always kept.
    """

    sinks: int = 4
    recent: int = 8

    def __post_init__(self) -> None:
        check(self, self.sinks >= 0, "sinks must be >= 0")
        check(self, self.recent >= 1, "recent must be at least 1")

    @property
    def pinned(self) -> int:
        return self.sinks

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("value_norm",)

    def protected(self, capacity: Tensor) -> Tensor:
        return torch.full_like(capacity, self.recent)

    def arrive(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return {"value_norm": values.float().norm(dim=-1)}

    def score(self, entries: Entries) -> Tensor:
        return entries.state("value_norm")


@pytest.fixture
def registered() -> Iterator[None]:
    register(ValueNorm)
    yield
    registry._discover().pop("value_norm")


def test_contributing_shows_this_code() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert inspect.getsource(ValueNorm) in guide


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("recipe", ["value_norm(recent=5)", "value_norm(recent=5) | int4"])
def test_the_example_keeps_what_it_says(recipe: str) -> None:
    model = models.build("llama")
    ids = models.tokens(90)
    dense = DynamicCache(config=model.config)
    model(ids, past_key_values=dense)
    cache = CompressedCache(model, recipe, budget="24tok", track_positions=True)
    model(ids, past_key_values=cache)

    norms = dense.layers[0].values[0].float().norm(dim=-1)
    middle = norms[:, 4:-5].topk(24 - 4 - 5).indices.sort().values + 4
    for head, kept in enumerate(cache.positions(0)[0]):
        assert kept == [*range(4), *middle[head].tolist(), *range(85, 90)]


@pytest.mark.usefixtures("registered")
def test_the_example_generates_within_its_budget() -> None:
    model = models.build("llama")
    cache = CompressedCache(model, "value_norm | lazy(every=8) | int4", budget="70tok")
    ids = models.tokens(90)
    out = models.generate(model, cache, ids, n=20)
    assert out.sequences.shape[1] == 110
    stats, ceiling = cache.stats(), cache.ceiling()
    assert stats.stored_max <= 70 + 8
    assert ceiling is not None and stats.nbytes <= ceiling

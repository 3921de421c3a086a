"""Quality figures are read through the stored pages: without what is in them, there is none.

Every tensor of the pages that holds keys or values is zeroed after each forward, through the cache's own
tensors. A figure that were worked out beside the cache would not notice.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvloom import testbed
from kvloom.evaluation import decoders, measure, texts
from kvloom.evaluation.compare import Progress
from kvloom.evaluation.results import Protocol, Quality
from kvloom.evaluation.subjects import Cell, parse
from kvloom.evaluation.task_bench import prepare_task
from kvloom.hf import load


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    load.quiet()
    return load.pretrained(testbed.path(), torch.float32)


@pytest.fixture
def zeroed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pages are zeroed after each forward of a cache that compresses; counts the tensors."""
    count: list[int] = [0]
    feed = decoders.CacheDecoder.feed

    def feed_and_zero(self: Any, ids: torch.Tensor, keep: int = 1) -> torch.Tensor:
        logits = feed(self, ids, keep)
        if str(self.cache.recipe) == "none":  # the full cache beside it
            return logits
        for layer in self.cache.compressed:
            for tensor in layer.store.pool.parts()[0]:
                tensor.zero_()
                count[0] += 1
        return logits

    monkeypatch.setattr(decoders.CacheDecoder, "feed", feed_and_zero)
    return count


def score(trained: tuple[Any, Any], task: str, view: str) -> float:
    made = prepare_task(*trained, "testbed", task, view, 128)
    return made.measure(Cell(parse("int8")), Progress()).score


TASKS = [("needle(length=400, depth=0.3, examples=4)", "blind"), ("lines(length=400, examples=4)", "blind"),
         ("key_value(length=300, depth=0.3, examples=4)", "sighted")]  # fmt: skip


@pytest.mark.parametrize(("task", "view"), TASKS)
def test_tasks_are_answered_from_pages(trained: tuple[Any, Any], task: str, view: str) -> None:
    assert score(trained, task, view) >= 0.75


@pytest.mark.parametrize(("task", "view"), TASKS)
def test_without_pages_tasks_are_not_answered(
    trained: tuple[Any, Any], zeroed: list[int], task: str, view: str
) -> None:
    assert score(trained, task, view) == 0
    assert zeroed[0] > 0


def quality(trained: tuple[Any, Any]) -> Quality:
    model, tokenizer = trained
    document = texts.load("stdlib", tokenizer, 460)
    protocol = Protocol(tokens=460, prefill=400, prefill_chunk=100, prefill_runs=1)
    with torch.inference_mode():
        return measure.measure(
            model, document.ids, parse("int8"), None, protocol, lambda n: None
        ).quality


def test_perplexity_is_read_from_pages(trained: tuple[Any, Any]) -> None:
    q = quality(trained)
    assert q.change is not None and abs(q.change) < 0.02
    assert q.kl is not None and q.kl < 0.01 and q.top1 is not None and q.top1 > 0.95


def test_without_pages_perplexity_collapses(trained: tuple[Any, Any], zeroed: list[int]) -> None:
    q = quality(trained)
    assert zeroed[0] > 0
    assert q.change is not None and q.change > 1  # more than twice the full cache's
    assert q.kl is not None and q.kl > 0.5 and q.top1 is not None and q.top1 < 0.8
    assert q.perplexity is not None and q.dense_perplexity is not None
    assert q.perplexity > 1.5 * q.dense_perplexity

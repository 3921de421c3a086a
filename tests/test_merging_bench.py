"""What the merging benchmarks read side by side is what they would read alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import needles
from kvloom.evaluation.decoders import decoder_for, feed_prompt
from tests.scripts import load

pytestmark = pytest.mark.full  # half a minute
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONTEXT, DECODE = 260, 10


@pytest.mark.parametrize("recipe", ["mp_kvm(max_centroids=24)", "h2o"])
def test_rows_of_a_batch_are_documents_and_tasks(recipe: str) -> None:
    subject, budget = Recipe.parse(recipe), Budget.parse("60%")
    with torch.inference_mode():
        bench = load(BENCHMARKS / "merging.py").Bench(CONTEXT, DECODE, 2, 3, "float32")
        reading = bench.read(subject, budget)
        assert reading.stats.evicted > 0
        for ids, together in zip(bench.documents, reading.logits, strict=True):
            decoder = decoder_for(bench.model, subject, budget)
            feed_prompt(decoder, ids[:CONTEXT], 0)
            alone = [decoder.feed(i)[-1] for i in ids[CONTEXT:-1].split(1)]
            assert torch.allclose(torch.stack(alone), together, atol=1e-3)
            assert decoder.nbytes() == reading.held[-1]
        shortest = min(len(task.context) for task in bench.tasks)
        cut = [dataclasses.replace(t, context=t.context[-shortest:]) for t in bench.tasks]
        alone = [needles.answered(bench.model, bench.tokenizer, subject, budget, t) for t in cut]
        assert bench.right(subject, budget) == alone


def test_a_sweeps_rows_hold_what_their_fraction_says() -> None:
    sweep, merging = (load(BENCHMARKS / f"{n}.py") for n in ("merge_sweep", "merging"))
    with torch.inference_mode():
        bench = merging.Bench(CONTEXT, DECODE, 2, 2, "float32")
        row = sweep.measure(bench, "streaming_llm", 25)
        full = sweep.measure(bench, "none", None)
    assert row["nbytes"][0] / row["dense"] == pytest.approx(0.25, rel=0.05)  # tails grow by 16
    assert full["given"] is None and full["kl"] == pytest.approx([0, 0], abs=1e-6)
    assert full["nbytes"][0] >= full["dense"]

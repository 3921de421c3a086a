from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from kvloom import testbed
from kvloom.cli import demo
from kvloom.core.recipe import Recipe


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def path() -> None:
        raise FileNotFoundError("no weights")

    monkeypatch.setattr(testbed, "path", path)


def shown(more: list[demo.Row], prompt_tokens: int = 200) -> str:
    out = io.StringIO()
    demo.run(Console(file=out, width=140), prompt_tokens, 4, more)
    return out.getvalue()


@pytest.mark.usefixtures("no_weights")
def test_random_weights_show_bytes_and_claim_no_quality() -> None:
    threads = torch.get_num_threads()
    text = shown([("h2o | int4", "100tok")])
    assert torch.get_num_threads() == threads
    recipes = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert recipes == [row[0] for row in demo.ROWS] + ["h2o | int4"]
    assert "100tok" in text
    assert "random" in text and "top-1" not in text


def test_bytes_are_those_of_the_cache() -> None:
    subject = demo.random_llama(150)
    reference, dense, _ = demo.generate(subject, ("none", None), 4)
    assert len(reference) == 4
    assert dense.seen == [153] and dense.stored_min == 153
    slots = 128 + 32  # two pages, and a tail in granules of 16 for the other 25
    config = subject.model.config
    per_slot = 2 * config.head_dim * 2 * config.num_key_value_heads * config.num_hidden_layers
    assert sum(dense.by_part[p] for p in ("pages", "tail")) == pytest.approx(
        slots * per_slot, rel=0.01
    )


def test_agreement_counts_the_choices_under_the_same_tokens() -> None:
    subject = demo.random_llama(100)
    same, quantized = demo.measure(subject, [("none", None), ("none", None)], 6)
    assert (same[1], quantized[1]) == (1.0, 1.0)
    reference, _, _ = demo.generate(subject, ("none", None), 6)
    dictated = (reference + 1) % subject.model.config.vocab_size
    followed, _, share = demo.generate(subject, ("none", None), 6, dictated)
    assert followed.tolist() == dictated.tolist() and share < 1


@pytest.mark.parametrize("trained", [True, False])
def test_agreement_is_shown_for_trained_weights_only(trained: bool) -> None:
    subject = demo.random_llama(64)
    subject.trained = trained
    out = io.StringIO()
    results = demo.measure(subject, [("none", None)], 2)
    Console(file=out, width=140).print(demo.table(subject, 2, results))
    assert ("top-1" in out.getvalue() and "100%" in out.getvalue()) == trained


def test_rows_are_recipes() -> None:
    for text, _ in demo.ROWS:
        assert str(Recipe.parse(text)) == text

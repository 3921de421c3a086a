"""A corpus and a recipe small enough to train on within a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# training/ is not part of the installed package: it is found from the checkout.
sys.path.insert(0, str(Path(__file__).parents[2]))

from training import config, tokenizer
from training.corpus import Corpus

from kvloom.testbed import phrases


@pytest.fixture(scope="session")
def as_toml() -> Callable[[config.Recipe], str]:
    return _toml


def _toml(recipe: config.Recipe) -> str:
    """The text that ``config.parse`` reads as this recipe."""
    values = asdict(recipe)
    model, optimizer, stages = (values.pop(name) for name in ("model", "optimizer", "stages"))
    parts = [_lines(values), "[model]", _lines(model), "[optimizer]", _lines(optimizer)]
    return "\n".join([*parts, *(f"[[stage]]\n{_lines(stage)}" for stage in stages)])


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {v}" for k, v in value.items()) + " }"
    return json.dumps(value)


PROSE = (
    "It was late in the evening when the captain came down to the harbour. "
    "Nobody had seen the boat, and nobody asked where it had gone. "
    "def answer(question):\n    return None\n"
)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    facts = "\n".join(
        s.format(name="Clara", thing="key", kind="number") for s in phrases.STATEMENTS
    )
    bpe = tokenizer.train([PROSE * 4 + facts], vocab=400)
    ids = np.array(bpe.encode(PROSE * 60).ids, dtype=np.uint16)
    return Corpus(bpe, books=ids, code=ids[::-1].copy(), held_out=ids)


@pytest.fixture(scope="session")
def recipe(corpus: Corpus) -> config.Recipe:
    """Six steps of a two-layer model over every kind of sequence."""
    model = config.ModelConfig(
        vocab=corpus.tokenizer.get_vocab_size(),
        hidden=32,
        intermediate=48,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        max_positions=256,
    )
    mixture = dict.fromkeys(
        ("text", "repeat", "associate", "copy", "questions", "needle", "key_values"), 1.0
    )
    stage = config.Stage(until=1536, batch_tokens=512, lengths={64: 1.0, 128: 1.0}, mixture=mixture)
    return config.Recipe(
        seed=1,
        answer_weight=4.0,
        code_share=0.25,
        bf16=True,
        micro_tokens=256,
        save_seconds=3600,
        log_steps=2,
        probe_steps=4,
        workers=0,
        model=model,
        optimizer=config.Optimizer(warmup=1024, cooldown=1024),
        stages=(stage, replace(stage, until=3072, lengths={128: 1.0})),
    )

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import checkpoint, config
from training.corpus import Corpus
from training.grow import grow, grow_run
from training.model import Llama
from training.train import Trainer

TOKENS = torch.arange(2, 82).view(2, 40)


@pytest.fixture(scope="module")
def large(recipe: config.Recipe) -> config.ModelConfig:
    """Twice as wide in everything, and one layer deeper."""
    return replace(recipe.model, hidden=64, intermediate=96, heads=4, kv_heads=2, layers=3)


def test_the_grown_model_computes_the_same(
    recipe: config.Recipe, large: config.ModelConfig
) -> None:
    small = Llama(recipe.model, seed=3)
    for parameter in small.parameters():
        parameter.data *= 4
    grown = Llama(large)
    grown.load_state_dict(grow(small.state_dict(), recipe.model, large, seed=5))
    expected = small.logits(small(TOKENS))
    torch.testing.assert_close(grown.logits(grown(TOKENS)), expected, rtol=1e-3, atol=1e-4)


def test_the_copies_are_told_apart(recipe: config.Recipe, large: config.ModelConfig) -> None:
    grown = grow(Llama(recipe.model).state_dict(), recipe.model, large, seed=5)
    query = grown["model.layers.0.self_attn.q_proj.weight"]
    left, right = query.split(recipe.model.hidden, dim=1)
    assert not torch.allclose(left, right, atol=0.5 * query.std().item())


def test_uneven_growth_is_refused(recipe: config.Recipe, large: config.ModelConfig) -> None:
    with pytest.raises(ValueError, match="one whole factor"):
        grow({}, recipe.model, replace(large, hidden=96), seed=0)


def test_training_goes_on_from_the_grown_checkpoint(
    corpus: Corpus, recipe: config.Recipe, large: config.ModelConfig, tmp_path: Path
) -> None:
    trainer = Trainer(recipe, corpus, torch.device("cpu"))
    state = {"tokens": 512, "corpus": "-"}
    checkpoint.save(tmp_path / "a" / "checkpoints", 1, trainer.tensors(), state)
    (tmp_path / "a" / "data").mkdir()
    larger = replace(recipe, model=large)
    tensors, state = checkpoint.load(grow_run(tmp_path / "a", recipe, larger, tmp_path / "b"))
    resumed = Trainer(larger, corpus, torch.device("cpu"))
    resumed.restore(tensors, state)
    assert (resumed.step, resumed.tokens, state["grown_from"]) == (1, 512, 512)
    ours, theirs = trainer.model, resumed.model
    torch.testing.assert_close(theirs.logits(theirs(TOKENS)), ours.logits(ours(TOKENS)))

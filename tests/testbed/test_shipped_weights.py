from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom import testbed
from kvloom.testbed import tasks, texts


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(testbed.path()).eval()


def test_weights_and_tokenizer_stay_small() -> None:
    assert sum(file.stat().st_size for file in testbed.path().iterdir()) <= 12 * 2**20


def test_the_shape_is_what_large_models_have_in_small(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama" and config.head_dim == 64
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.max_position_embeddings >= 4096


def test_planted_facts_are_found_under_unseen_phrasings(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(testbed.path())
    filler = "\n".join(texts.held_out_texts())[:20_000]
    right = 0
    for seed in range(5):
        task = tasks.needle(
            seed, filler, 300, lambda t: len(tokenizer(t).input_ids), facts=2, unseen=True
        )
        inputs = tokenizer(task.prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=7, do_sample=False)
        right += task.correct(str(tokenizer.decode(out[0, inputs.input_ids.shape[1] :])))
    assert right >= 4

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from training import phenomena as measures
from training import report
from training.evaluate import PARTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom import testbed
from kvloom.testbed import tasks, texts


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(testbed.path()).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(testbed.path())


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    return json.loads((testbed.path() / "evaluation.json").read_text())


def answered(model: Any, tokenizer: Any, task: tasks.Task) -> bool:
    inputs = tokenizer(task.prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    return task.correct(str(tokenizer.decode(out[0, inputs.input_ids.shape[1] :])))


def test_the_folder_stays_small() -> None:
    files = [f for f in testbed.path().parent.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert testbed.path() / "model.safetensors" in files
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_the_weights_are_stored_in_half_precision() -> None:
    with safe_open(testbed.path() / "model.safetensors", framework="pt") as file:
        names = file.keys()
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}


def test_the_evaluation_is_of_these_weights_and_texts(evaluation: dict[str, Any]) -> None:
    about, made_with = evaluation["about"], evaluation["measured_with"]
    weights = (testbed.path() / "model.safetensors").read_bytes()
    assert about["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert about["texts"].keys() == evaluation["loss"].keys()
    assert all(len(text["sha256"]) == 64 for text in about["texts"].values())
    assert tuple(sorted(made_with)) == tuple(sorted(PARTS))
    for environment in made_with.values():
        assert {"commit", "kvloom", "torch", "transformers"} <= environment.keys()


def test_the_shape_is_what_large_models_have_in_small(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama" and config.head_dim == 64
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.max_position_embeddings >= 4096
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("length", "unseen", "n"),
    [(300, True, 4), (1000, True, 3), pytest.param(2000, False, 5, marks=pytest.mark.full)],
)
def test_planted_facts_are_found(
    model: Any, tokenizer: Any, length: int, unseen: bool, n: int
) -> None:
    filler = "\n".join(texts.held_out_texts())[:60_000]
    right = 0
    for seed in range(n):
        task = tasks.needle(
            seed, filler, length, lambda t: len(tokenizer(t).input_ids), facts=2, unseen=unseen
        )
        right += answered(model, tokenizer, task)
    assert right >= n - 1


def test_values_are_found_in_lists_of_keys(model: Any, tokenizer: Any) -> None:
    made = [tasks.key_value(seed, pairs=24, depth=seed / 7) for seed in range(8)]
    assert sum(answered(model, tokenizer, task) for task in made) >= 6


def test_the_card_shows_the_recorded_figures_and_pictures(evaluation: dict[str, Any]) -> None:
    card = (testbed.path() / "MODEL_CARD.md").read_text()
    assert report.evaluation(evaluation) in card
    made = json.loads((testbed.path() / "training.json").read_text())
    assert report.targets(evaluation, gpu=made["versions"]["machine"] != "CPU") in card
    for name in ("recall", "loss", "first_tokens", "retrieval_heads", "key_channels"):
        assert f"(figures/{name}.png)" in card
        assert (testbed.path() / "figures" / f"{name}.png").is_file()


def test_the_phenomena_are_there(evaluation: dict[str, Any]) -> None:
    phenomena = evaluation["phenomena"]
    sinks, channels = phenomena["sinks"], phenomena["channels"]
    assert sinks["uniform_share_of_four"] == round(measures.uniform_share(4), 4) == 0.0093
    assert sinks["mean_first_four"] > 3 * sinks["uniform_share_of_four"]
    assert phenomena["retrieval_heads"]["above_half"] >= 1
    assert channels["mean_keys"] > 1.5 * channels["mean_values"]

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import checkpoint, config, export, figures, limits, phenomena, report
from training.corpus import Corpus
from training.evaluate import begin, evaluate, subject
from training.train import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = Path(__file__).parents[2] / "training" / "recipes"


@pytest.fixture(scope="module")
def exported(
    corpus: Corpus,
    recipe: config.Recipe,
    as_toml: Callable[[config.Recipe], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Trainer, Path]:
    run = tmp_path_factory.mktemp("run")
    trainer = Trainer(recipe, corpus, torch.device("cpu"))
    state = {"tokens": 512, "seconds": 60.0, "seed": 1, "corpus": "-"}
    versions = dict.fromkeys(("python", "torch", "numpy", "tokenizers", "machine"), "-")
    checkpoint.save(run / "checkpoints", 1, trainer.tensors(), {**state, "versions": versions})
    (run / "data").mkdir()
    corpus.tokenizer.save(str(run / "data" / "tokenizer.json"))
    (run / "tiny.toml").write_text(as_toml(recipe))
    export.export(run, run / "tiny.toml", run / "weights")
    return trainer, run / "weights"


def test_transformers_computes_the_same_logits(exported: tuple[Trainer, Path]) -> None:
    trainer, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(2, 130).view(2, 64)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.half().float())
        ours = trainer.model.logits(trainer.model(tokens))
        theirs = model(tokens).logits
    assert model.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_begins_texts_and_splits_digits(exported: tuple[Trainer, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("is 12345").input_ids)
    assert tokens[0] == tokenizer.bos_token == "<|begin|>"
    assert tokens[-5:] == list("12345")
    assert tokenizer.decode(tokenizer("naïve — 7").input_ids, skip_special_tokens=True) == (
        "naïve — 7"
    )


def test_the_card_names_what_is_unfinished(exported: tuple[Trainer, Path]) -> None:
    card = (exported[1] / "MODEL_CARD.md").read_text()
    assert "512 tokens (17 % of a schedule of 3,072)" in card
    assert "not finished" in card and "Not evaluated yet" in card
    assert json.loads((exported[1] / "training.json").read_text())["tokens"] == 512


def test_recipes_of_earlier_parts_are_recorded(
    exported: tuple[Trainer, Path], recipe: config.Recipe, tmp_path: Path
) -> None:
    run, earlier = exported[1].parent, RECIPES / "cpu_small.toml"
    export.export(run, run / "tiny.toml", tmp_path, note="Two parts.", earlier=[earlier])
    made = json.loads((tmp_path / "training.json").read_text())
    assert config.parse(made["recipe"]) == recipe
    assert made["earlier_recipes"] == [earlier.read_text()]
    assert "Two parts." in (tmp_path / "MODEL_CARD.md").read_text()


def test_an_evaluation_can_be_read_as_a_page(
    exported: tuple[Trainer, Path], tmp_path: Path
) -> None:
    folder = exported[1]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.phenomena.LENGTH", 200)
        patch.setattr("training.phenomena.retrieval_heads", no_retrieval_heads)
        patch.setattr("training.evaluate.key_value_recall", lambda *_: KEY_VALUES)
        patch.setattr("training.limits.CONTEXT", 192)
        patch.setattr("training.limits.FREE_TASKS", 2)
        results = dict(evaluate(model, tokenizer, [], [192, 256], depths=2, rounds=2))
    results = json.loads(json.dumps(results))
    results |= {"about": subject(folder, None, []), "measured_with": {"loss": {"commit": "abc"}}}
    page = report.evaluation(results)
    assert "- loss: commit abc" in page and results["about"]["weights_sha256"][:16] in page
    assert "cut in all other layers, it is 0.0 %." in report.limits(results)
    assert "| 256 | 0.0 % (0.0 to 19.4) | 0.0 % (0.0 to 19.4) |" in page
    assert "| 8 | 100 | 25.0 % (14.2 to 40.2) | 40 |" in page
    for path in figures.draw(results, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG") and f"/{path.name})" in page
    assert 0 < results["phenomena"]["sinks"]["mean_first_four"] < 0.5
    by_position = results["loss"]["held-out stdlib"]["bits_per_byte_by_position"]
    assert list(by_position) == ["0-64", "64-128", "128-256"]
    beyond, layers = results["beyond"], results["layers"]
    assert list(beyond["recall"]) == ["288", "320", "384"]
    assert list(beyond["bits_per_byte_by_position"])[-1] == "320-384"
    assert len(layers["only"]) == len(layers["all_but"]) == model.config.num_hidden_layers


def test_figures_of_other_weights_or_texts_are_not_gone_on_from(
    exported: tuple[Trainer, Path], tmp_path: Path
) -> None:
    about = subject(exported[1], None, [])
    path = tmp_path / "evaluation.json"
    assert begin(path, about) == {"about": about, "measured_with": {}}
    path.write_text(json.dumps({"about": about, "measured_with": {}, "loss": 1}))
    assert begin(path, about)["loss"] == 1
    assert "loss" not in begin(path, {**about, "weights_sha256": "-"})
    assert "loss" not in begin(path, subject(exported[1], tmp_path / "books.txt", ["More."]))


KEY_VALUES = {"8": {"all": 0.25, "count": 40, "tokens": 100}}


def no_retrieval_heads(*_: object) -> dict[str, object]:
    return {"score": [[0.0, 0.0]] * 2, "above_half": 0, "heads": 4}


def test_the_recipes_in_the_repository_are_valid() -> None:
    recipes = {path.stem: config.load(path) for path in RECIPES.glob("*.toml")}
    for recipe in recipes.values():
        assert recipe.model.head_dim == 64 and recipe.model.heads > recipe.model.kv_heads
    for name in ("cpu", "cpu_ship", "gpu"):
        assert max(recipes[name].stages[-1].lengths) == 4096
    assert min(recipes["cpu"].total, recipes["gpu"].total) >= 100_000_000
    assert recipes["cpu_ship"].model == recipes["cpu"].model


def test_attention_spread_evenly_is_averaged_over_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert phenomena.uniform_share(4) == pytest.approx(0.0093, abs=5e-5)
    monkeypatch.setattr(phenomena, "LENGTH", 4)
    monkeypatch.setattr(phenomena, "SETTLED", 2)
    assert phenomena.uniform_share(1) == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_a_layer_without_its_past_sees_the_newest_of_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LEFT", 2)
    assert limits.visible(5, seen=3)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 1],
    ]


def test_the_card_says_which_aims_were_missed() -> None:
    def both(share: float) -> dict[str, dict[str, float]]:
        return {kind: {"all": share} for kind in ("seen", "unseen")}

    results = {
        "recall": {"512": both(1.0), "1024": both(0.94), "2048": both(0.9)},
        "loss_by_context": {"prose": {"512": 1.2, "1024": 1.1, "2048": 1.3}},
    }
    cpu, gpu = (report.targets(results, gpu) for gpu in (False, True))
    assert cpu.count("reached") == 5 and cpu.count("**missed**") == 2
    assert "| at least 95.0 % | 94.0 % | **missed** |" in cpu
    assert gpu.count("**missed**") == 5 and "1.200, 1.100, 1.300" in gpu


@pytest.mark.parametrize(
    ("share", "count", "low", "high"), [(1.0, 132, 0.9717, 1.0), (0.5, 40, 0.3520, 0.6480)]
)
def test_intervals_are_wilsons(share: float, count: int, low: float, high: float) -> None:
    assert report.interval(share, count) == pytest.approx((low, high), abs=1e-4)

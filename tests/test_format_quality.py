"""`benchmarks/format_quality.py`: its shortcuts change no figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvloom.core.format import PAGE
from kvloom.core.recipe import Recipe
from kvloom.evaluation import calibrate, compare
from kvloom.formats._calibration import Calibration
from tests.scripts import load

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "format_quality.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load(BENCHMARK)


@pytest.fixture(scope="module")
def bench(benchmark: ModuleType) -> Any:
    """The benchmark with one short document."""
    asked = {"documents": 1, "tokens": 270, "prefill": 180, "needles": 0, "needle_tokens": 64}
    with torch.inference_mode():
        yield benchmark.Bench("testbed", argparse.Namespace(**asked))


@pytest.fixture(scope="module")
def rounding(bench: Any) -> float:
    """How far logits of a full cache differ where tokens come one by one."""
    return float((bench.read(Recipe(), stepwise=True)[0] - bench.dense).abs().max())


@pytest.mark.parametrize(
    "recipe",
    ["int3", "int2(hadamard='both')", "kivi", "turboquant_mse(bits=2)", "streaming_kvquant",
     "kvquant(bits=2)"],
)  # fmt: skip
def test_tokens_fed_up_to_the_next_sealing_see_what_they_see_one_by_one(
    bench: Any, rounding: float, recipe: str
) -> None:
    """But for rounding, which may put a number on the verge into the next code once it is sealed."""
    subject = Recipe.parse(recipe)
    at_once, cache = bench.read(subject)
    singly, same = bench.read(subject, stepwise=True)
    assert cache.nbytes == same.nbytes and cache.stats().sealed == same.stats().sealed > 0
    dense = bench.dense.double().log_softmax(-1)
    kl = [
        float((dense.exp() * (dense - x.double().log_softmax(-1))).sum(-1).mean())
        for x in (at_once, singly)
    ]
    assert kl[0] == pytest.approx(kl[1], rel=0.01)
    before = min(PAGE - (bench.prefill - subject.format.pinned) % PAGE, at_once.shape[1])
    assert (at_once - singly)[:, :before].abs().max() < 4 * rounding


def test_a_sealing_elsewhere_than_expected_is_an_error(bench: Any) -> None:
    subject = Recipe.parse("kivi")
    _, cache = bench.read(subject)
    bench._check(cache, 128, subject)
    with pytest.raises(RuntimeError, match="'kivi' has sealed 128 tokens of each head, not 192"):
        bench._check(cache, 192, subject)


def test_the_loud_copys_calibration_is_what_calibrating_it_gives(
    benchmark: ModuleType, bench: Any, tmp_path: Path
) -> None:
    samples, facts = bench.documents[:, :256].view(2, 128), {"bits": "3", "outliers": "0.01"}
    benchmark.loud_copy(tmp_path)
    loud, _ = compare.load_model(str(tmp_path), "float32", "cpu")
    with torch.inference_mode(False):
        samples = samples.clone()
        mine, its = (
            calibrate.calibrate(model, samples, 3, 0.01, facts, lambda steps: None)
            for model in (bench.model, loud)
        )
    mine.save(tmp_path / "plain.safetensors")
    (tmp_path / "copy").mkdir()
    made = Calibration.load(
        benchmark.louder(tmp_path / "plain.safetensors", loud, tmp_path / "copy")
    )
    assert made.facts["model_sha256"] != mine.facts.get("model_sha256")
    assert float((made.key_scale / mine.key_scale).max()) == benchmark.LOUD
    ulp = torch.finfo(torch.float16).eps
    assert torch.allclose(made.key_offset, its.key_offset, rtol=2 * ulp, atol=1e-3)
    assert torch.allclose(made.key_scale, its.key_scale, rtol=2 * ulp, atol=0)
    for name in ("key_levels", "key_matched", "value_levels", "value_matched"):
        assert torch.allclose(getattr(made, name), getattr(its, name), atol=0.01), name


def test_a_line_that_a_killed_process_left_is_measured_again(
    benchmark: ModuleType, bench: Any, tmp_path: Path
) -> None:
    path, lines = tmp_path / "results.jsonl", lambda: path.read_text().splitlines()
    benchmark.measure_all(bench, ["int4"], tmp_path)
    benchmark.measure_all(bench, ["int4"], tmp_path)
    assert len(lines()) == 1
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    benchmark.measure_all(bench, ["int4", "int8"], tmp_path)
    assert len(lines()) == 2 and lines()[0] + "\n" == whole
    assert [json.loads(line)["recipe"] for line in lines()] == ["int4", "int8"]

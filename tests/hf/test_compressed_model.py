"""The published face: a config that is a recipe, a model that compresses by itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM

from kvloom import CompressedCache, CompressedModelForCausalLM, CompressionConfig, testbed
from kvloom.hf.compressed_model import compressed
from tests.models import build, generate, left_padded, tokens

DOC = Path(__file__).parents[2] / "docs" / "streaming-kvquant.md"


# -- the config ----------------------------------------------------------------------------------


def test_recommended_defaults_are_the_formats():
    assert str(CompressionConfig().recipe()) == "streaming_kvquant"


def test_every_field_reaches_the_recipe():
    other = dict(
        chunk_size=1024, ema_decay=0.95, attention_sink_size=8, key_bits_normal=8,
        value_bits_normal=3, key_bits_sink_outlier=16, value_bits_sink_outlier=4,
        outlier_threshold_relative=2.5, outlier_threshold_abs=10.0,
        outlier_detection_enabled=False, value_quant_groups=4, key_quant_per_channel=False,
        quantize_pre_rope=False, enable_mixed_precision_cache=False, adaptive_chunk_size=True,
        periodic_stat_reset=True, stat_reset_interval=7,
    )  # fmt: skip
    assert set(other) == set(CompressionConfig().to_dict())
    assert str(CompressionConfig(**other).recipe()) == (
        "streaming_kvquant(key_bits=8, value_bits=3, key_outlier_bits=16, value_outlier_bits=4, "
        "chunk=1024, decay=0.95, sinks=8, relative=2.5, absolute=10.0, detect=False, "
        "key_per_channel=False, value_groups=4, rope='post', mixed_precision=False, "
        "adaptive=True, reset=7)"
    )
    plain = CompressionConfig()
    for name, value in other.items():
        changed = CompressionConfig(**{name: value})
        waits = name == "stat_reset_interval"  # for periodic_stat_reset
        assert (changed.recipe() == plain.recipe()) == waits, name


def test_16_bits_are_no_quantization():
    assert str(CompressionConfig(key_bits_normal=16, value_bits_normal=16).recipe()) == "none"
    only_values = CompressionConfig(key_bits_normal=16).recipe().format
    layout = only_values.layout(16, 16, torch.float32)
    assert layout.slot["keys"].dtype == torch.float32 and "value_codes" in layout.tile


def test_a_chunk_has_the_whole_pages_in_it():
    assert CompressionConfig(chunk_size=1000).recipe().format.chunk == 960


def test_to_dict_and_back():
    config = CompressionConfig(chunk_size=256, outlier_threshold_abs=5.0)
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CompressionConfig.from_dict({"ema_decay": 0.99}).chunk_size == 512
    with pytest.raises(ValueError, match=r"has no bits, emma; it has chunk_size, ema_decay"):
        CompressionConfig.from_dict({"emma": 1, "bits": 4})


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("key_bits_normal", 1, "max|x| / (2^0 - 1) divides by zero"),
        ("value_bits_sink_outlier", 1, "1 bit has no symmetric scale"),
        ("value_bits_normal", 5, "bits are one of (2, 3, 4, 8, 16)"),
        ("value_bits_normal", 4.0, "bits are one of"),
        ("ema_decay", 1.0, "between 0 and 1"),
        ("ema_decay", 0, "between 0 and 1"),
        ("outlier_threshold_relative", 1, "above 1"),
        ("outlier_threshold_abs", -2.0, "above 0, or None"),
        ("attention_sink_size", -1, "an int, 0 or more"),
        ("chunk_size", 63, "64 or more"),
        ("chunk_size", 512.0, "an int, 0 or more"),
        ("stat_reset_interval", 0, "an int, 1 or more"),
        ("adaptive_chunk_size", 1, "True or False"),
    ],
)
def test_bad_values_are_restated_with_the_rule(name, value, rule):
    with pytest.raises(ValueError) as error:
        CompressionConfig(**{name: value})
    assert f"CompressionConfig({name}={value!r})" in str(error.value) and rule in str(error.value)


# -- the model -----------------------------------------------------------------------------------


def quickstart() -> str:
    """The first Python block of the page."""
    return DOC.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_the_published_quickstart_runs_as_printed(capsys):
    code = quickstart()
    assert "CompressedLlamaForCausalLM.from_pretrained" in code
    code = code.replace('"meta-llama/Llama-2-7b-hf"', "PATH")
    made = {"PATH": str(testbed.path())}
    exec(compile(code, str(DOC), "exec"), made)
    printed = capsys.readouterr().out
    assert "Average key bits" in printed
    assert isinstance(made["model"], LlamaForCausalLM)
    assert made["model"].dtype == torch.float16
    assert made["model"].get_compression_stats()["total_outliers"] == 0


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_the_quickstart_quantizes_a_longer_prompt(capsys):
    """Past the first page of 64 what is printed is no longer 16 bits."""
    code = quickstart().replace('"meta-llama/Llama-2-7b-hf"', "PATH").replace("=50)", "=2)")
    short = '"The key-value cache of a language model"'
    assert short in code
    made = {"PATH": str(testbed.path()), "PROMPT": "import os\n" * 60}
    lines = code.replace(short, "PROMPT").split("model.reset_compression_state()")
    exec(compile(lines[0], str(DOC), "exec"), made)
    stats = made["model"].get_compression_stats()
    assert 4 < stats["avg_key_bits"] < 16 and 4 < stats["avg_value_bits"] < 16
    assert f"Average key bits: {stats['avg_key_bits']:.2f}" in capsys.readouterr().out


@pytest.fixture
def model():
    return compressed(copy.deepcopy(build("llama")), CompressionConfig(chunk_size=128))


def test_generate_uses_a_fresh_cache_each_time(model):
    plain = build("llama")
    ids, mask = left_padded([200, 90])
    want = generate(plain, CompressedCache(plain, model.compression_recipe), ids, mask, n=8)
    for _ in "ab":
        got = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert torch.equal(got.sequences, want.sequences)
        assert isinstance(got.past_key_values, CompressedCache)
        stats = model.get_compression_stats()
        assert stats == {n: got.past_key_values.stats().to_dict()[n] for n in stats}


def test_a_cache_of_ones_own_is_left_alone(model):
    for cache in (DynamicCache(config=model.config), CompressedCache(model, "int8")):
        model.generate(tokens(100), past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert cache.get_seq_length() == 102
    assert model.get_compression_stats()["avg_key_bits"] == 0
    out = model.generate(
        tokens(100), use_cache=False, max_new_tokens=2, return_dict_in_generate=True
    )
    assert out.past_key_values is None


def test_plain_calls_cache_as_the_model_would(model):
    ids = tokens(150)
    with torch.no_grad():
        first = model(ids)
        assert isinstance(first.past_key_values, CompressedCache)
        cache = first.past_key_values
        again = model(ids[:, :1], past_key_values=cache)
        assert again.past_key_values is cache and cache.get_seq_length() == 151
        assert model(ids, use_cache=False).past_key_values is None
        dense = build("llama")(ids).logits
    assert (first.logits - dense).abs().max() < 1e-4 * dense.abs().max()  # it sees itself exactly
    with torch.enable_grad():
        assert not isinstance(model(ids).past_key_values, CompressedCache)
        asked = model(ids, use_cache=True).past_key_values
        assert isinstance(asked, CompressedCache)


def test_stats_begin_at_zero_and_can_be_reset(model):
    empty = model.get_compression_stats()
    assert empty["avg_key_bits"] == empty["total_outliers"] == 0 and empty["layer_stats"] == []
    model.generate(tokens(300), max_new_tokens=2, do_sample=False)
    stats = model.get_compression_stats()
    assert 4 < stats["avg_key_code_bits"] < stats["avg_key_bits"] < 32
    assert 0 < stats["compression_ratio_key"] < 4 and len(stats["layer_stats"]) == 3
    json.dumps(stats)
    model.reset_compression_state()
    assert model.get_compression_stats() == empty


def test_other_instances_of_the_class_are_not_touched(model):
    plain = build("llama")
    assert not isinstance(plain, CompressedModelForCausalLM)
    assert isinstance(model, type(plain)) and isinstance(model, CompressedModelForCausalLM)
    assert type(plain).generate is not type(model).generate


def test_saved_and_copied_like_any_model(model, tmp_path):
    model.generate(tokens(100), max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["LlamaForCausalLM"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is LlamaForCausalLM and plain.config._attn_implementation == "sdpa"
    again = CompressedModelForCausalLM.from_pretrained(
        tmp_path, compression_config={"chunk_size": 128}, device_map="cpu"
    )
    twin = copy.deepcopy(model)
    for other in (again, twin):
        out = other.generate(tokens(100), max_new_tokens=4, do_sample=False)
        assert torch.equal(out, model.generate(tokens(100), max_new_tokens=4, do_sample=False))
        assert other.get_compression_stats() == model.get_compression_stats()
        assert other._compressed_cache is not model._compressed_cache


def test_compressing_twice_replaces_the_recipe(model):
    own = type(model).__bases__[1]
    model.generate(tokens(100), max_new_tokens=2, do_sample=False)
    again = compressed(model, "int8")
    assert again is model and type(model).__bases__ == (CompressedModelForCausalLM, own)
    assert type(model).__name__ == own.__name__ == "LlamaForCausalLM"
    assert str(model.compression_recipe) == "int8" and model.compression_config is None
    assert model.get_compression_stats()["avg_key_bits"] == 0
    with pytest.raises(ValueError, match="evicts down to a budget"):
        compressed(model, "h2o | int8")
    assert str(model.compression_recipe) == "int8"


def test_any_recipe_without_a_budget_will_do():
    model = compressed(copy.deepcopy(build("llama")), "int8")
    model.generate(tokens(130), max_new_tokens=2, do_sample=False)
    assert model.compression_config is None
    assert model.get_compression_stats()["avg_key_code_bits"] < 20
    with pytest.raises(ValueError, match="evicts down to a budget"):
        compressed(copy.deepcopy(build("llama")), "h2o | int8")


def test_beams(model):
    out = model.generate(tokens(150), num_beams=3, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 155)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_testbed_model_continues_a_text_as_it_does_dense(bits):
    path = testbed.path()
    config = CompressionConfig(key_bits_normal=bits, value_bits_normal=bits)
    model = CompressedModelForCausalLM.from_pretrained(path, compression_config=config)
    inputs = AutoTokenizer.from_pretrained(path)("import os\n" * 60, return_tensors="pt")
    got = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    dense = DynamicCache(config=model.config)
    want = model.generate(**inputs, past_key_values=dense, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, want)

"""Bad input: a clear error that restates the input and names the rule; the cache stays usable."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvloom import CompressedCache, Scorer, register
from kvloom.core import registry
from kvloom.hf.context import Context
from tests.models import build, generate, left_padded, tokens


@pytest.mark.parametrize(
    ("recipe", "budget", "words"),
    [
        ("h20", "10tok", ["'h20'", "unknown method 'h20'", "did you mean 'h2o'"]),
        ("h2o(recents=1)", "10tok", ["'recents'", "did you mean 'recent'", "it has: recent, sinks"]),
        ("h2o(recent=2)", "10tok", ["h2o(recent=2)", "within 0..1"]),
        ("h2o(recent='x')", "10tok", ["h2o(recent='x')"]),
        ("streaming_llm(sinks=-1)", "10tok", ["sinks=-1", "sinks must be an int >= 0"]),
        ("h2o | int4 | dense", "10tok", ["one format", "'int4'", "'dense'"]),
        ("h2o | streaming_llm", "10tok", ["one scorer"]),
        ("int4 +", None, ["'int4 +'", "not a chain of policies"]),
        ("int4 | lazy(every=4)", None, ["without a scorer"]),
        ("mean_centroid | int4", None, ["nothing in the recipe evicts"]),
        ("h2o", None, ["none was given", "1024tok"]),
        ("h2o", "ten", ["'ten'", "1024tok"]),
        ("h2o", "0tok", ["'0tok'", "above 0"]),
        ("h2o", "130%", ["'130%'", "at most 100%"]),
        ("h2o", "1.5tok", ["whole numbers"]),
        ("h2o", "1KiB", ["1KiB", "below the floor", "bytes per row"]),
        ("streaming_llm", "4tok", ["'4tok'", "below the floor", "4 sinks"]),
        ("streaming_llm(recent=60)", "50tok", ["states its own size", "64 entries"]),
        ("int4", "25%", ["'25%'", "nothing in the recipe evicts"]),
        ("h2o | lazy(rule='paper', every=64, max_drop=32)", "90tok", ["grows without bound"]),
        ("h2o | lazy(rule='paper', every=64, max_drop=32, unbounded=True)", "90tok", ["no bound"]),
    ],
)  # fmt: skip
def test_recipes_and_budgets(recipe, budget, words):
    with pytest.raises(ValueError) as error:
        CompressedCache(build("llama"), recipe, budget)
    for word in words:
        assert word in str(error.value)


def test_config_only():
    """From a config alone the dense fallback is used, and what needs the model says so."""
    model = build("llama")
    config = AutoConfig.for_model(
        "llama", **{k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    )
    assert CompressedCache(config, "int4").recipe.format is not None
    with pytest.raises(ValueError, match="constructed from a config"):
        CompressedCache(config, "h2o", "50tok")


@pytest.mark.parametrize("recipe", ["none", "h2o | int4", "streaming_llm | int4_channel"])
def test_a_cache_serves_one_model(recipe):
    model, other, bigger = build("llama"), build("qwen3"), build("gpt_neox_80")
    cache = CompressedCache(model, recipe, None if recipe == "none" else "90tok")
    for stranger in (other, bigger):
        CompressedCache(stranger)  # attaches it
    model(tokens(100), past_key_values=cache)
    with pytest.raises(ValueError, match="made for a 'llama' model"):
        other(tokens(5), past_key_values=cache)
    with pytest.raises(ValueError, match="serves one model"):
        bigger(tokens(5), past_key_values=cache)
    with pytest.raises(ValueError, match="serves one model and one batch"):
        model(tokens(5, rows=3), past_key_values=cache)
    _usable(model, cache, recipe)


def _usable(model, cache, recipe, seen=100):
    """The cache goes on exactly as one to which nothing bad happened."""
    clean = CompressedCache(model, recipe, None if recipe == "none" else "90tok")
    model(tokens(100), past_key_values=clean)
    assert cache.get_seq_length() == seen
    got, want = (model(tokens(30, seed=4), past_key_values=c).logits for c in (cache, clean))
    assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("new", [1, 7])
@pytest.mark.parametrize("recipe", ["none", "h2o | int4", "streaming_llm | int4_channel"])
def test_nan_keys(recipe, new, layer, bad):
    """Wherever the NaN shows up, the forward is taken back in all layers, or the cache says it broke."""
    model = build("llama")
    cache = CompressedCache(model, recipe, None if recipe == "none" else "90tok")
    model(tokens(100), past_key_values=cache)
    spoil = model.model.layers[layer].self_attn.k_proj.register_forward_hook(
        lambda module, inputs, out: out * bad
    )
    with pytest.raises(ValueError, match="NaN or Inf"):
        model(tokens(new, seed=3), past_key_values=cache)
    spoil.remove()
    if layer == 0 or recipe == "none":
        _usable(model, cache, recipe)
        return
    # layers before it had already evicted for these tokens: that cannot be taken back
    with pytest.raises(RuntimeError, match=r"no longer holds one consistent sequence; call reset"):
        model(tokens(1), past_key_values=cache)
    cache.reset()
    model(tokens(100), past_key_values=cache)
    _usable(model, cache, recipe)


def test_interrupted_forward_is_taken_back():
    """Ctrl-C, out of memory in an MLP: the next use finds the cache as it was."""
    model = build("llama")
    cache = CompressedCache(model, "none")
    model(tokens(100), past_key_values=cache)

    def stop(module, inputs):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(3), past_key_values=cache)
    hook.remove()
    _usable(model, cache, "none")


def test_nan_on_an_accelerator_is_found_at_the_next_synchronisation():
    """No wait per token there: a flag is kept on the device and read later."""
    flagged = Context.__new__(Context)
    flagged.bad, flagged.fresh = {}, {}
    keys = torch.zeros(1, 1, 1, 2, device="meta")
    flagged.check_finite(keys, keys)
    assert list(flagged.fresh) == [keys.device] and not flagged.bad  # until the forward has ended
    flagged.bad = {torch.device("cpu"): torch.tensor(True)}
    for _ in range(2):  # and again until they are gone
        with pytest.raises(ValueError, match="NaN or Inf"):
            flagged.raise_bad()
    flagged.forget_bad()
    flagged.raise_bad()


def test_generate_notices_what_an_accelerator_flagged():
    """The flag is put where a device would leave it; without padding there is no mask to wait for."""
    model = build("llama")
    cache = CompressedCache(model, "h2o | int4", "90tok")

    def flag(module, inputs, out):
        if out.shape[1] == 1:
            cache.context.fresh[torch.device("cpu")] = torch.tensor(True)

    spoil = model.model.layers[0].self_attn.k_proj.register_forward_hook(flag)
    with pytest.raises(ValueError, match=r"NaN or Inf.*call reset\(\)"):
        model.generate(tokens(100), past_key_values=cache, max_new_tokens=40, do_sample=False)
    spoil.remove()
    assert 100 < cache.get_seq_length() <= 112  # at once where generate always makes a mask (5.17)
    cache.reset()
    model(tokens(100), past_key_values=cache)
    _usable(model, cache, "h2o | int4")


@pytest.mark.parametrize("recipe", ["h2o", "streaming_llm"])
def test_4d_mask_with_an_evicting_recipe(recipe):
    model = build("llama")
    cache = CompressedCache(model, recipe, "90tok")
    model(tokens(100), past_key_values=cache)
    mask = torch.ones(1, 1, 5, 105, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"4D attention mask \(1, 1, 5, 105\).*evicts"):
        model(tokens(5), attention_mask=mask, past_key_values=cache)
    _usable(model, cache, recipe)


def test_short_2d_mask():
    model = build("llama")
    cache = CompressedCache(model, "none")
    model(tokens(100), past_key_values=cache)
    with pytest.raises(ValueError, match=r"5 columns.*seen 100 tokens.*all 105"):
        model(tokens(5), attention_mask=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    _usable(model, cache, "none")


def test_failing_scorer_loses_nothing():
    class Broken(Scorer):
        """Scores NaN from the second compression on."""

        calls = 0

        def score(self, entries):
            Broken.calls += 1
            return entries.valid.float() * (1.0 if Broken.calls <= 3 else float("nan"))

    registry_before = dict(registry.policies())
    register(Broken)
    try:
        model = build("llama")
        cache = CompressedCache(model, "broken", "90tok", track_positions=True)
        model(tokens(100), past_key_values=cache)
        with pytest.raises(ValueError, match="broken: a score is NaN"):
            model(tokens(1), past_key_values=cache)
        assert cache.get_seq_length() == 100
        assert len(cache.positions(2)[0][0]) == 90
    finally:
        registry._discover().pop("broken")
    assert registry.policies() == registry_before


def test_training_is_refused():
    model = build("llama").train()
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"model\.eval"):
        model(tokens(5), past_key_values=CompressedCache(model))


def test_unknown_attention_mode():
    with pytest.raises(ValueError, match="attention='flash'"):
        CompressedCache(build("llama"), attention="flash")


def test_short_rows_and_empty_rows():
    """Rows of one token, and a prompt shorter than the sinks."""
    model = build("llama")
    ids, mask = left_padded([40, 1, 3])
    for recipe in ("streaming_llm(sinks=4, recent=20) | int4", "h2o | int4"):
        cache = CompressedCache(model, recipe, "24tok" if "h2o" in recipe else None)
        out = generate(model, cache, ids, mask, n=30)
        alone = CompressedCache(model, recipe, "24tok" if "h2o" in recipe else None)
        one = generate(model, alone, ids[1:2, -1:], n=30)
        assert torch.equal(out.sequences[1, 40:], one.sequences[0, 1:])


@pytest.mark.parametrize("recipe", ["none", "recent"])
def test_past_columns_cannot_be_hidden_afterwards(recipe):
    model = build("llama")
    cache = CompressedCache(model, recipe, None if recipe == "none" else "50tok")
    ids = tokens(62)
    model(ids[:, :40], past_key_values=cache, attention_mask=torch.ones(1, 40, dtype=torch.long))
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[:, 5:20] = 0
    with pytest.raises(ValueError, match=r"shows \[25\] of the 40 columns .* \[40\] were valid"):
        model(ids[:, 40:60], past_key_values=cache, attention_mask=mask)
    out = model(ids[:, 40:60], past_key_values=cache, attention_mask=torch.ones_like(mask))
    assert torch.isfinite(out.logits).all() and cache.get_seq_length() == 60


def test_crop_after_a_forward_that_broke_off():
    model, ids = build("llama"), tokens(140)
    cache = CompressedCache(model, "none")
    model(ids[:, :128], past_key_values=cache)

    def fail(*args):
        raise RuntimeError("broken")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        model(ids[:, 128:130], past_key_values=cache)
    hook.remove()
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [125] * 3
    got = model(ids[:, 125:130], past_key_values=cache).logits
    want = model(ids[:, :130], use_cache=False).logits[:, 125:]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    "recipe", ["streaming_kvquant(chunk=64)", "int4", "kivi(residual=32)", "kvquant"]
)
@pytest.mark.parametrize("first", [10, 256])
def test_a_forward_that_broke_off_leaves_no_trace(recipe, first):
    """Pages that earlier layers sealed, from their exact tails on: tails and statistics are back."""
    model, ids = build("llama"), tokens(600)
    broken, whole = CompressedCache(model, recipe), CompressedCache(model, recipe)
    for cache in (broken, whole):
        model(ids[:, :first], past_key_values=cache)

    def fail(*args):
        raise RuntimeError("broken")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    sealed = broken.layers[0].store.counters.sealed
    for n in (144, 1, 200):
        with pytest.raises(RuntimeError, match="broken"):
            model(ids[:, :n], past_key_values=broken)
    hook.remove()
    assert broken.layers[0].store.counters.sealed > sealed
    assert broken.get_seq_length() == first
    for part in ids[:, first:].split(90, 1):
        got, want = (model(part, past_key_values=c).logits for c in (broken, whole))
        assert torch.equal(got, want)
    held = broken.layers[0].store
    assert held.sealing is None and not broken.context.committed


@pytest.mark.parametrize("recipe", ["h2o", "streaming_llm", "recent | weighted(heads=(1.0, 0.3))"])
def test_an_attention_switched_afterwards_is_noticed(recipe):
    model = build("llama")
    cache = CompressedCache(model, recipe, "50tok")
    model(tokens(60), past_key_values=cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="switched to 'sdpa' afterwards"):
        model(tokens(1), past_key_values=cache)
    model.set_attn_implementation("kvloom")
    model(tokens(1), past_key_values=cache)
    assert cache.get_seq_length() == 61


def test_crop_leaves_all_layers_alone_if_a_window_cannot_follow():
    config = build("gemma3").config
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = CompressedCache(model, "none")
    model(tokens(40), past_key_values=cache)
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 3


def test_more_rows_than_a_budget_can_hold():
    model = build("llama")
    floor = CompressedCache(model, "h2o", "50tok").floor()
    cache = CompressedCache(model, "h2o", 3 * floor)
    model(tokens(200), past_key_values=cache)
    with pytest.raises(ValueError, match=r"below the floor.*the batch has 6"):
        cache.batch_repeat_interleave(6)
    cache.batch_repeat_interleave(3)
    model(tokens(1, rows=3), past_key_values=cache)
    assert cache.nbytes <= 3 * floor


def test_a_dense_cache_serves_one_model():
    model, other = build("llama"), build("llama", seed=1)
    cache = CompressedCache(model, "none", attention="dense")
    CompressedCache(other, "none", attention="dense")
    with pytest.raises(ValueError, match="one cache per model"):
        other(tokens(5), past_key_values=cache)
    model(tokens(5), past_key_values=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("recent", [40, 900])
def test_positions_that_nobody_keeps(recent):
    """Whether there are pages already or not."""
    model = build("llama")
    cache = CompressedCache(model, f"streaming_llm(recent={recent})")
    model(tokens(1100), past_key_values=cache)
    with pytest.raises(ValueError, match=r"keeps no positions.*track_positions=True"):
        cache.positions(0)

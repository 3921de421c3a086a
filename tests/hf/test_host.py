"""The cache inside transformers: assisted decoding, copies, crops, masks, dtypes, devices."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from kvloom import CompressedCache
from tests.models import FAMILIES, build, generate, left_padded, tokens

H2O = "h2o | int4"


@pytest.mark.oldest
@pytest.mark.parametrize("family", list(FAMILIES))
def test_none_equals_dynamic_cache(family):
    ours, plain = build(family), build(family)
    if family in ("gpt_oss", "gemma2"):  # stock SDPA knows neither sinks nor softcap
        plain.set_attn_implementation("eager")
    ids, mask = left_padded([90, 33])
    got = generate(ours, CompressedCache(ours), ids, mask)
    want = generate(plain, DynamicCache(config=plain.config), ids, mask)
    assert torch.equal(got.sequences, want.sequences)
    limit = 1e-4 * torch.stack(want.logits).abs().max()
    assert (torch.stack(got.logits) - torch.stack(want.logits)).abs().max() < limit


@pytest.mark.oldest
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_assisted_decoding_of_a_full_cache_is_lossless(family, draft):
    model = build(family)
    assistant = (
        {"prompt_lookup_num_tokens": 4}
        if draft == "lookup"
        else {"assistant_model": build(family, seed=1)}
    )
    ids = tokens(20).repeat(1, 5)
    want = generate(model, CompressedCache(model), ids, n=24)
    got = generate(model, CompressedCache(model), ids, n=24, **assistant)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("recipe", [H2O, "streaming_llm | int4_channel", "h2o | mean_centroid"])
def test_assisted_decoding_compresses_and_leaves_no_trace(recipe):
    """Not lossless under eviction, but bounded, and later turns compress as usual."""
    model = build("llama")
    cache = CompressedCache(model, recipe, "70tok")
    ids = tokens(20).repeat(1, 6)
    out = generate(model, cache, ids, n=30, prompt_lookup_num_tokens=4)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    more = torch.cat([out.sequences, tokens(30, seed=5)], 1)
    out = generate(model, cache, more, n=20)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert cache.nbytes <= cache.ceiling()
    assert max(int(layer.store.stored.max()) for layer in cache.layers) <= 71


def test_rejected_drafts_do_not_vote():
    """h2o after accepting 2 of 5 drafts equals h2o that saw only those 2."""
    model, ids = build("llama"), tokens(100)
    drafted, plain = (CompressedCache(model, "h2o", "70tok", track_positions=True) for _ in "ab")
    for cache in (drafted, plain):
        model(ids[:, :60], past_key_values=cache)
    drafted.activate_past_recording()
    model(ids[:, 60:65], past_key_values=drafted)
    drafted.crop(-3)
    model(ids[:, 60:62], past_key_values=plain)
    for a, b in zip(drafted.layers, plain.layers, strict=True):
        received = [x.store.tail.meta["received"][:, :, : x.store.tail.longest] for x in (a, b)]
        assert a.store.tail.longest == b.store.tail.longest
        assert torch.allclose(*received, atol=1e-6)
    logits = [model(ids[:, 62:63], past_key_values=c).logits for c in (drafted, plain)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].abs().max()


@pytest.mark.parametrize("recipe", ["none", "int4", "int4_channel", "dense(rope='pre')"])
@pytest.mark.parametrize("n", [1, 5, 70, 140])
def test_crop_of_a_full_cache(recipe, n):
    """Cropping forgets the newest tokens, sealed ones too, and the cache goes on as before."""
    model, ids = build("llama"), tokens(200)
    cache, short = CompressedCache(model, recipe), CompressedCache(model, recipe)
    model(ids, past_key_values=cache)
    cache.crop(-n)
    assert cache.get_seq_length() == 200 - n
    if n < 8 or recipe == "none":  # no page boundary is crossed, or pages are exact
        model(ids[:, : 200 - n], past_key_values=short)
        got, want = (model(ids[:, :40], past_key_values=c).logits for c in (cache, short))
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
    else:
        got = model(ids[:, :150], past_key_values=cache).logits
        assert torch.isfinite(got).all() and cache.get_seq_length() == 350 - n
    with pytest.raises(ValueError, match="cannot remove"):
        cache.crop(-10_000)


def test_crop_after_eviction_is_refused_before_anything_changes():
    model = build("llama")
    cache = CompressedCache(model, "h2o", "50tok")
    model(tokens(100), past_key_values=cache)
    before = cache.nbytes
    with pytest.raises(RuntimeError, match="compressed 0 tokens ago"):
        cache.crop(-1)
    assert cache.nbytes == before and cache.get_seq_length() == 100


def test_prefix_reuse_by_copy():
    """The common idiom: prefill once, copy, ask several questions."""
    model = build("llama")
    prefix = CompressedCache(model, H2O, "80tok")
    context = tokens(150)
    model(context, past_key_values=prefix)
    answers = []
    for seed in (3, 4, 3):
        cache = copy.deepcopy(prefix)
        ids = torch.cat([context, tokens(10, seed=seed)], 1)
        answers.append(generate(model, cache, ids).sequences[:, 160:])
    assert torch.equal(answers[0], answers[2]) and prefix.get_seq_length() == 150
    assert not torch.equal(answers[0], answers[1])


def test_batch_selection():
    model = build("llama")
    ids, mask = left_padded([140, 100, 60])
    cache = CompressedCache(model, H2O, "80tok")
    model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
    )
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([0]))
    one.batch_repeat_interleave(2)
    token = tokens(1)
    got = model(token.repeat(2, 1), past_key_values=one).logits
    full = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    want = model(token.repeat(3, 1), attention_mask=full, position_ids=full.sum(1, keepdim=True) - 1,
                 past_key_values=cache).logits  # fmt: skip
    assert (got - want[:1]).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "recipe", ["none", "int4", "h2o | int4_channel", "streaming_llm(recent=60) | int4"]
)
def test_half_precision(dtype, recipe):
    """At most twice the error of stock attention in the same dtype, against fp32."""
    budget = "90tok" if "h2o" in recipe else None
    ids = tokens(160)

    def run(dtype, wrap):
        model = build("llama", dtype=dtype)
        cache = wrap(model)
        outs = [model(ids[:, i : i + 40], past_key_values=cache).logits for i in range(0, 160, 40)]
        return torch.cat(outs, 1).float()

    stock = [run(d, lambda m: DynamicCache(config=m.config)) for d in (torch.float32, dtype)]
    ours = [run(d, lambda m: CompressedCache(m, recipe, budget)) for d in (torch.float32, dtype)]
    naive = (stock[1] - stock[0]).norm()
    assert torch.isfinite(ours[1]).all()
    if recipe == "none":
        assert (ours[1] - ours[0]).norm() < 2 * naive
    else:  # other codes and other kept sets: half precision must not be worse than compression
        effect = (ours[0] - stock[0]).norm()
        assert (ours[1] - ours[0]).norm() < effect + 2 * naive


def test_layers_on_two_devices():
    """A meta layer stands in for a second device: stores live where their layer's keys are."""
    model = build("llama")
    cache = CompressedCache(model, H2O, "60tok")
    model(tokens(80), past_key_values=cache)
    layer = cache.layers[1]
    assert layer.store.device == torch.device("cpu")
    other = CompressedCache(model, "none")
    keys = torch.zeros(1, 2, 5, 16, device="meta")
    other.layers[1].lazy_initialization(keys, keys)
    other.layers[0].lazy_initialization(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16))
    assert {x.store.device.type for x in other.layers[:2]} == {"cpu", "meta"}


def test_disk_offload(tmp_path):
    """Layers that accelerate keeps on disk run through the same cache."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = build("llama"), build("llama")
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    got = generate(model, CompressedCache(model, H2O, "70tok"), tokens(100))
    want = generate(plain, CompressedCache(plain, H2O, "70tok"), tokens(100))
    assert torch.equal(got.sequences, want.sequences)


def test_4d_mask_without_eviction():
    """A user's own 4D mask is honoured column by column, past and new."""
    model, plain = build("llama"), build("llama")
    ids = tokens(150)
    visible = torch.ones(150, 150, dtype=torch.bool).tril()
    visible[:, 10:20] = False  # nobody but themselves sees these columns
    visible |= torch.eye(150, dtype=torch.bool)
    cache, stock = CompressedCache(model), DynamicCache(config=plain.config)
    for start, stop in ((0, 100), (100, 150)):
        mask = visible[None, None, start:stop, :stop]
        got = model(ids[:, start:stop], attention_mask=mask, past_key_values=cache).logits
        want = plain(ids[:, start:stop], attention_mask=mask, past_key_values=stock).logits
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_4d_mask_over_several_slabs():
    """Each slab gets its own columns of the mask."""
    model, plain = build("llama"), build("llama")
    cache, stock = CompressedCache(model), DynamicCache(config=plain.config)
    for seed in range(3):
        model(tokens(64, seed=seed), past_key_values=cache)
        plain(tokens(64, seed=seed), past_key_values=stock)
    mask = torch.ones(4, 196, dtype=torch.bool).tril(192)
    mask[:, 70:90] = False
    mask = mask[None, None]
    got = model(tokens(4), attention_mask=mask, past_key_values=cache).logits
    want = plain(tokens(4), attention_mask=mask, past_key_values=stock).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_selecting_rows_without_pages():
    """Pages that no remaining row uses go; what reads decoded entries goes on."""
    model = build("llama")
    ids, mask = left_padded([150, 9])
    cache = CompressedCache(model, "h2o | mean_centroid | int4", "90tok")
    model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
    )
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.stats().by_part["pages"] == 0
    mask = mask[1:]
    for i in range(120):
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
        model(
            tokens(1, seed=i),
            attention_mask=mask,
            position_ids=torch.tensor([[9 + i]]),
            past_key_values=cache,
        )
    assert cache.stats().evicted > 0 and cache.nbytes <= cache.ceiling()


def test_other_caches_still_work_on_an_attached_model():
    model, plain = build("gemma2"), build("gemma2")
    plain.set_attn_implementation("eager")
    CompressedCache(model)
    got = generate(model, DynamicCache(config=model.config), tokens(40))
    want = generate(plain, DynamicCache(config=plain.config), tokens(40))
    assert torch.equal(got.sequences, want.sequences)
    loss = model(tokens(40), use_cache=False).logits - plain(tokens(40), use_cache=False).logits
    assert loss.abs().max() < 1e-3


def test_gradients_enabled_outside():
    model = build("llama")
    with torch.enable_grad():
        cache = CompressedCache(model, H2O, "60tok")
        for _ in range(3):
            model(tokens(50), past_key_values=cache)
        tensors = [t for layer in cache.layers for t in layer.store.tensors()]
    assert not any(t.requires_grad for t in tensors)


# -- models that need dense tensors --------------------------------------------------------------


def mla_model():
    torch.manual_seed(0)
    config = tf.DeepseekV3Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, pad_token_id=0,
        initializer_range=0.2, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model = tf.DeepseekV3ForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def falcon_model():
    torch.manual_seed(0)
    config = tf.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False,
        new_decoder_architecture=False, multi_query=False, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model = tf.FalconForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("make", [falcon_model, mla_model, lambda: build("llama")])
@pytest.mark.parametrize("padded", [False, True])
def test_dense_fallback_equals_dynamic_cache(make, padded):
    model = make()
    ids, mask = left_padded([90, 40]) if padded else (tokens(90), None)
    got = generate(model, CompressedCache(model, "none", attention="dense"), ids, mask)
    want = generate(model, DynamicCache(config=model.config), ids, mask)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize(
    "recipe", ["streaming_llm(recent=70, sinks=2, positions='original')", "int4"]
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 32])
def test_dense_fallback_equals_handles(recipe, padded, chunk):
    handles, dense = build("llama"), build("llama")
    ids, mask = left_padded([140, 60]) if padded else (tokens(140), None)
    extra = {} if chunk is None else {"prefill_chunk_size": chunk}
    want = generate(handles, CompressedCache(handles, recipe), ids, mask, **extra)
    got = generate(dense, CompressedCache(dense, recipe, attention="dense"), ids, mask, **extra)
    assert torch.equal(got.sequences, want.sequences)
    difference = (torch.stack(got.logits) - torch.stack(want.logits)).abs().max()
    assert difference < 2e-3 * torch.stack(want.logits).abs().max()


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [("h2o", "50tok"), ("h2o | mean_centroid", "50tok"), ("streaming_llm", "50tok"),
     ("streaming_llm(positions='original') | weighted(heads=(1, 2))", "50tok"),
     ("streaming_llm(positions='original') | int4_channel", "90tok")],
)  # fmt: skip
def test_dense_fallback_refuses_with_the_reason(recipe, budget):
    with pytest.raises(ValueError, match="multi-head latent attention"):
        CompressedCache(mla_model(), recipe, budget)


def test_shared_layers_are_refused():
    config = tf.Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)
    with pytest.raises(ValueError, match="share keys and values"):
        from kvloom.hf.families import cache_refusal

        raise ValueError(cache_refusal(config))


def test_encoder_decoder_is_refused():
    config = tf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(ValueError, match="encoder-decoder"):
        CompressedCache(tf.T5ForConditionalGeneration(config), "none")


def test_generate_batch_is_refused():
    from kvloom.hf.attention import attention_function

    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="generate_batch"):
        attention_function(torch.nn.Identity(), x, x, x, None, cache=object())

"""Edges that a review found: gaps, padding in odd places, crops, masks, failures half way."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from kvloom import CompressedCache
from kvloom.formats.int4 import Int4
from tests.models import build, left_padded, tokens

pytestmark = pytest.mark.oldest

ORIGINAL = "streaming_llm(sinks=2, positions='original'"


def padded_run(model, cache, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def test_pre_rope_pages_with_a_gap_in_the_positions():
    """A page stores its first position only while the others follow from it."""
    model, plain = build("llama"), build("llama")
    ids = tokens(200)
    positions = torch.arange(200)[None].clone()
    positions[:, 100:] += 500
    cache = CompressedCache(model, "dense(rope='pre')", track_positions=True)
    stock = DynamicCache(config=plain.config)
    for start, stop in ((0, 150), (150, 190), (190, 200)):
        at = {"position_ids": positions[:, start:stop]}
        got = model(ids[:, start:stop], past_key_values=cache, **at).logits
        want = plain(ids[:, start:stop], past_key_values=stock, **at).logits
        assert (got - want).abs().max() < 1e-3 * want.abs().max()
    assert cache.positions(0)[0][0] == positions[0].tolist()


def test_in_cache_positions_with_right_padding():
    model = build("llama")
    ids, turn = tokens(100), tokens(6, seed=2)
    recipe = "streaming_llm(sinks=2, recent=40)"
    alone = CompressedCache(model, recipe)
    model(ids, past_key_values=alone)
    want = model(turn, past_key_values=alone).logits
    cache = CompressedCache(model, recipe)
    model(ids, past_key_values=cache)
    mask = torch.ones(1, 109, dtype=torch.long)
    mask[:, 106:] = 0
    filled = torch.cat([turn, torch.zeros(1, 3, dtype=torch.long)], 1)
    at = torch.tensor([[100, 101, 102, 103, 104, 105, 1, 1, 1]])
    got = model(filled, attention_mask=mask, position_ids=at, past_key_values=cache).logits
    assert (got[:, :6] - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [(f"{ORIGINAL})", "25%"), (f"{ORIGINAL}, recent=30) | lazy(every=32)", None)],
)
def test_dense_fallback_refuses_rows_of_different_length(recipe, budget):
    model = build("llama")
    cache = CompressedCache(model, recipe, budget, attention="dense")
    with pytest.raises(ValueError, match="different numbers of entries"):
        padded_run(model, cache, *left_padded([90, 40]))


def test_dense_fallback_reads_past_an_allocation_that_is_still_empty():
    """At 128 tokens the page that the tail will fill next lies in a new slab."""
    model, ids = build("llama"), tokens(130)
    cache = CompressedCache(model, "none", attention="dense")
    want = model(ids).logits
    model(ids[:, :100], past_key_values=cache)
    for i in range(100, 130):
        got = model(ids[:, i : i + 1], past_key_values=cache).logits
    assert (got[:, -1] - want[:, -1]).abs().max() < 1e-3 * want.abs().max()


def test_dense_fallback_refuses_padding_in_the_middle():
    model = build("llama")
    cache = CompressedCache(model, "none", attention="dense")
    ids, mask = left_padded([40, 40])
    padded_run(model, cache, ids, mask)
    more = torch.cat([mask, torch.tensor([[1, 1], [0, 1]])], 1)
    with pytest.raises(ValueError, match="after a row's first token"):
        model(tokens(2, rows=2), attention_mask=more, past_key_values=cache)


def test_config_only_eviction_with_several_rows_is_refused():
    model = build("llama")
    cache = CompressedCache(model.config, f"{ORIGINAL}, recent=30)")
    with pytest.raises(ValueError, match="no model was given"):
        padded_run(model, cache, *left_padded([80, 50]))


def test_crop_over_padding_is_refused():
    model = build("llama")
    cache = CompressedCache(model, "none")
    model(tokens(40, rows=2), past_key_values=cache)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 40:50] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, 40:]}
    model(tokens(20, rows=2), past_key_values=cache, **padded)
    cache.crop(-5)
    with pytest.raises(RuntimeError, match="were padding"):
        cache.crop(-10)
    assert {layer.columns for layer in cache.layers} == {55}


def test_crop_is_all_or_nothing():
    model = build("llama")
    cache = CompressedCache(model, "h2o | weighted(layers=(4.0, 1.0, 1.0))", "60tok")
    model(tokens(80), past_key_values=cache)
    before = [layer.store.stored.tolist() for layer in cache.layers]
    with pytest.raises(RuntimeError, match="compressed"):
        cache.crop(-3)
    assert [layer.store.stored.tolist() for layer in cache.layers] == before
    assert {layer.columns for layer in cache.layers} == {80}


def test_cropping_does_not_pile_up_dead_slots():
    model = build("llama")
    cache = CompressedCache(model, "none")
    for seed in range(25):
        model(tokens(70, seed=seed), past_key_values=cache)
        cache.crop(-60)
    fresh = CompressedCache(model, "none")
    model(tokens(250), past_key_values=fresh)
    assert cache.nbytes < 1.6 * fresh.nbytes


def test_all_drafts_rejected():
    model = build("llama")
    cache = CompressedCache(model, "h2o", "70tok")
    cache.activate_past_recording()
    model(tokens(40), past_key_values=cache)
    cache.crop(0)
    model(tokens(5), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("how", ["padded", "cropped", "stale", "additive"])
def test_4d_masks_that_cannot_be_honoured(how):
    model = build("llama")
    cache = CompressedCache(
        model, "none" if how != "stale" else "h2o", None if how != "stale" else "30tok"
    )
    rows = 2 if how == "padded" else 1
    if how == "padded":
        padded_run(model, cache, *left_padded([50, 30]))
    else:
        model(tokens(50), attention_mask=torch.ones(1, 50, dtype=torch.long), past_key_values=cache)
    if how == "cropped":
        model(tokens(80), past_key_values=cache)
        cache.crop(-40)
        model(tokens(60), past_key_values=cache)
    seen = cache.get_seq_length()
    mask = torch.ones(rows, 1, 3, seen + 3, dtype=torch.bool).tril(seen)
    if how == "additive":
        mask = torch.randn(1, 1, 3, seen + 3)
    if how == "cropped":  # the dead slots of a crop lie between the columns
        with pytest.raises(ValueError, match="cropped"):
            model(tokens(3, rows=rows), attention_mask=mask, past_key_values=cache)
        return
    with pytest.raises(ValueError, match="4D attention mask"):
        model(tokens(3, rows=rows), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == seen


def test_a_failing_format_loses_nothing(monkeypatch):
    model = build("llama")
    cache = CompressedCache(model, "int4", track_positions=True)
    model(tokens(50), past_key_values=cache)

    def fail(self, batch, statistics):
        raise MemoryError("no room to encode")

    with monkeypatch.context() as patch:
        patch.setattr(Int4, "encode", fail)
        with pytest.raises(MemoryError):
            model(tokens(30), past_key_values=cache)
    assert cache.get_seq_length() == 50
    assert [cache.positions(i)[0][0] for i in range(3)] == [list(range(50))] * 3


def test_byte_budget_counts_rows_and_the_real_dtype():
    model = build("llama")
    floor = CompressedCache(model, "h2o", "20tok").floor()
    cache = CompressedCache(model, "h2o", floor + 10)
    with pytest.raises(ValueError, match="the batch has 8"):
        model(tokens(20, rows=8), past_key_values=cache)
    model.config.dtype = torch.bfloat16  # says half of what the weights are
    small = CompressedCache(model, "h2o", int(0.8 * floor))
    with pytest.raises(ValueError, match="below the floor"):
        model(tokens(20), past_key_values=small)


def test_drafts_that_wait_are_counted_and_end_with_the_turn():
    model = build("llama")
    cache = CompressedCache(model, "h2o", "70tok")
    cache.activate_past_recording()
    model(tokens(200), past_key_values=cache)
    waiting = sum(
        t.untyped_storage().nbytes()
        for layer in cache.layers for t in (layer.pending.call.query, layer.pending.lse)
    )  # fmt: skip
    assert cache.stats().by_part["staged"] > waiting
    for _ in range(2):  # nobody cropped: from the second forward on nothing waits any more
        model(tokens(1), past_key_values=cache)
    assert cache.nbytes <= cache.ceiling()


def test_a_cache_is_freed():
    model = build("llama")
    cache = CompressedCache(model, "none")
    model(tokens(5), past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_merging_with_in_cache_positions_is_refused():
    with pytest.raises(ValueError, match="say positions='original'"):
        CompressedCache(build("llama"), "streaming_llm | mean_centroid", "50tok")


def test_two_models_of_one_config():
    """Sharing a config object is not being the same model."""
    model = build("llama")
    twin = type(model)(model.config).eval()
    cache = CompressedCache(model)
    with pytest.raises(ValueError, match="one cache per model"):
        twin(tokens(5), past_key_values=cache)

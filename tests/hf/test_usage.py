"""Bits per key and value: what pools really hold, shared sets once, metadata told apart."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core import registry
from tests.models import build, left_padded, tokens

SHARED = "streaming_kvquant(chunk=128, sinks=0)"
OUTLIERS = "streaming_kvquant(relative=1.05, chunk=128, value_groups=2, sinks=0)"


def held(cache, part):
    """Bits of everything in the pools' slabs that serves `part`, ids of sets included."""
    total = 0.0
    for layer in cache.layers:
        pool = layer.store.pool
        for slab in pool.slabs:
            pairs = [(pool.layout.slot, slab.slot), (pool.layout.tile, slab.tile)]
            pairs += [(pool.layout.sets[family], slab.sets[family]) for family in slab.sets]
            for fields, tensors in pairs:
                total += sum(x.nbytes for n, x in tensors.items() if fields[n].part == part)
            for family, index in slab.index.items():
                parts = {f.part for f in pool.layout.sets[family].values()}
                total += index.nbytes / len(parts) if part in parts else 0
    return 8 * total


@pytest.mark.parametrize("recipe", [SHARED, OUTLIERS, "int4(keys='channel')", "int8", "dense"])
def test_bits_are_those_of_the_storages(recipe):
    """A prefill of whole pages: no spare page, no dead slot, so the slabs are what is used."""
    model, n = build("llama"), 64 * 5
    cache = CompressedCache(model, recipe)
    model(tokens(n, rows=2), past_key_values=cache)
    stats, elements = cache.stats(), 2 * n * 3 * 2 * 16
    if recipe != "dense":  # which keeps a page open for what comes next
        assert stats.avg_key_bits == pytest.approx(held(cache, "key") / elements)
        assert stats.avg_value_bits == pytest.approx(held(cache, "value") / elements)
        total = (stats.avg_key_bits + stats.avg_value_bits) * elements / 8
        assert total == pytest.approx(stats.by_part["pages"])
    assert stats.compression_ratio_key == pytest.approx(16 / stats.avg_key_bits)
    assert (stats.total_outliers > 0) == (recipe == OUTLIERS)
    sealed = 2 * elements
    assert stats.outlier_ratio == stats.total_outliers / sealed


def test_known_bits():
    """Heads of 16: codes of 4 bits; int4 adds two fp16 per token; a chunk's scales are shared."""
    model = build("llama")
    for recipe, bits in {"int4": 4 + 2, SHARED: 4 + 16 / 128 + 32 / 32 / 16 * 1.5}.items():
        cache = CompressedCache(model, recipe)
        model(tokens(256), past_key_values=cache)
        stats = cache.stats()
        assert stats.avg_key_code_bits == stats.avg_value_code_bits == 4
        # ids: an int32 per tile for the outliers of keys, one for the scales of both
        assert stats.avg_key_bits == stats.avg_value_bits == pytest.approx(bits)


@pytest.mark.parametrize("fmt", [SHARED, OUTLIERS, "int4"])
def test_exact_entries_count_in_the_models_dtype_and_evicted_ones_not_at_all(fmt):
    model = build("llama")
    cache = CompressedCache(model, f"h2o | {fmt}", "100tok")
    ids, mask = left_padded([300, 210])
    model(ids, attention_mask=mask, past_key_values=cache)
    stats = cache.stats()
    stores = [layer.store for layer in cache.layers]
    exact = sum(int((s.stored - s.pool.live).sum()) for s in stores) / sum(
        int(s.stored.sum()) for s in stores
    )
    assert 0 < exact < 1
    sealed_bits = (stats.avg_key_code_bits - exact * 32) / (1 - exact)
    assert sealed_bits == pytest.approx(4) if fmt != OUTLIERS else sealed_bits > 4
    seen = 510 * 2 * 3 * 16 * 16
    stored = sum(int(s.stored.sum()) for s in stores) * 16
    assert stats.compression_ratio_key == pytest.approx(seen / (stats.avg_key_bits * stored))


def test_layers_add_up():
    model = build("llama")
    cache = CompressedCache(model, OUTLIERS)
    model(tokens(300), past_key_values=cache)
    stats = cache.stats()
    rows = stats.layer_stats
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert sum(row["total_outliers"] for row in rows) == stats.total_outliers
    mean = sum(row["avg_key_bits"] for row in rows) / 3
    assert stats.avg_key_bits == pytest.approx(mean)


def test_rows_that_share_pages_count_each():
    model = build("llama")
    one, two = (CompressedCache(model, OUTLIERS) for _ in range(2))
    for cache in (one, two):
        model(tokens(300), past_key_values=cache)
    two.batch_repeat_interleave(2)
    a, b = one.stats(), two.stats()
    assert b.total_outliers == 2 * a.total_outliers
    assert b.avg_key_bits == pytest.approx(a.avg_key_bits)


def test_an_empty_cache_has_no_bits():
    stats = CompressedCache(build("llama"), SHARED).stats()
    assert stats.avg_key_bits == stats.outlier_ratio == stats.compression_ratio_key == 0
    assert stats.layer_stats == []


@pytest.mark.parametrize("name", sorted(registry.policies("format")))
def test_scales_and_ids_are_metadata(name):
    layout = registry.policies("format")[name]().layout(64, 64, torch.float16)
    named = {**layout.slot, **layout.tile}
    named |= {n: f for family in layout.sets.values() for n, f in family.items()}
    for field, f in named.items():
        assert f.metadata == field.endswith(("_scale", "_zero", "_ids", "_index", "_offset")), field

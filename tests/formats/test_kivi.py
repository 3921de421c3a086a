"""KIVI against its paper's groups in plain loops, and the entries that stay exact."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.format import PAGE
from kvloom.core.recipe import Recipe
from kvloom.formats.kivi import Kivi
from tests import models
from tests.formats.reading import Cell, fp16_below, place_of


def quantized(group: list[float], bits: int) -> list[float]:
    """One group there and back; z and s in fp16, as they are stored."""
    z = fp16_below(min(group))
    s = max(float(torch.tensor((max(group) - z) / (2**bits - 1)).half()), 2.0**-24)
    return [min(max(round((x - z) / s), 0), 2**bits - 1) * s + z for x in group]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (64, 128), (80, 80)])
def test_groups_are_those_of_the_paper(bits, group, key_dim, value_dim):
    keys, values = torch.randn(1, PAGE, key_dim), torch.randn(1, PAGE, value_dim) + 1
    keys[..., 3] *= 50  # what per-channel scales are for
    fmt = Kivi(bits=bits, group=group)
    got_keys, got_values = Cell(fmt, place_of(key_dim, value_dim)).read(keys, values)
    for c in range(key_dim):
        for start in range(0, PAGE, group):
            naive = quantized(keys[0, start : start + group, c].tolist(), bits)
            got = got_keys[0, start : start + group, c]
            torch.testing.assert_close(got, torch.tensor(naive), rtol=1e-5, atol=1e-5)
    for t in range(PAGE):
        for start in range(0, value_dim, group):
            naive = quantized(values[0, t, start : start + group].tolist(), bits)
            got = got_values[0, t, start : start + group]
            torch.testing.assert_close(got, torch.tensor(naive), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "width", "key", "value"),
    [
        ("kivi2", 128, 3.0, 3.0),
        ("kivi4", 128, 5.0, 5.0),
        ("kivi(group=64)", 128, 2.5, 2.5),
        ("kivi2", 80, 3.0, 3.2),  # three groups of values for 80 channels
    ],
)
def test_bits_count_scale_and_zero_of_every_group(text, width, key, value):
    layout = Recipe.parse(text).format.layout(width, width, torch.float16)
    assert layout.bits("key", width) == key and layout.bits("value", width) == value


@pytest.mark.parametrize(("residual", "sealed"), [(0, 192), (8, 192), (30, 128), (128, 64)])
def test_the_newest_entries_stay_exact(residual, sealed):
    """200 tokens: whole pages are sealed, and at least `residual` are not."""
    model = models.build("llama")
    cache = CompressedCache(model, f"kivi(residual={residual})")
    model(models.tokens(200), past_key_values=cache)
    for layer in cache.layers:
        assert layer.store.pool.live.tolist() == [[sealed] * 2]
        assert layer.store.tail.count.tolist() == [[200 - sealed] * 2]
    dense = CompressedCache(model, "none")
    model(models.tokens(200), past_key_values=dense)
    tail, plain = cache.layers[0].store.tail, dense.layers[0].store.tail
    held = tail.keys[:, :, : tail.longest]
    newest = plain.keys[:, :, : plain.longest][:, :, -held.shape[2] :]
    assert torch.equal(held[:, :, -newest.shape[2] :], newest)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("kivi(bits=3)", "bits is 2 or 4"),
        ("kivi(bits=1)", "bits is 2 or 4"),
        ("kivi(residual=-1)", "residual is an int >= 0"),
        ("kivi(group=128)", "group is 32 or 64"),
        ("kivi(group=32.0)", "group is 32 or 64"),
        ("kivi(bits=4.0)", "bits is 2 or 4"),
    ],
)
def test_bad_parameters_are_refused(text, rule):
    with pytest.raises(ValueError, match=rule):
        Recipe.parse(text)

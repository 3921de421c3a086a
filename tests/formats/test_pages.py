"""Every registered format: byte arithmetic, round trips, independence of pages."""

from __future__ import annotations

import pytest
import torch

from kvloom.core import registry
from kvloom.core.format import PAGE, PageBatch
from kvloom.formats import _nibbles
from kvloom.kernels.layout import TILE

FORMATS = {name: cls() for name, cls in registry.policies("format").items()}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pages(n=3, key_dim=16, value_dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, PAGE, key_dim, generator=generator).to(dtype)
    values = torch.randn(n, PAGE, value_dim, generator=generator).to(dtype)
    return PageBatch(keys, values, torch.zeros(n, dtype=torch.long), torch.arange(n))


def read(fmt, encoded, dtype, page):
    """Decode one page as a pool does: slots, and one scale set per tile."""
    slot = {name: x[page] for name, x in encoded.slot.items()}
    sets = {}
    if encoded.scale_set:
        own = int(encoded.set_of[page])
        sets = {
            name: x[own].expand(PAGE // TILE, *x.shape[1:]) for name, x in encoded.scale_set.items()
        }
    return fmt.decode(slot, sets, dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_byte_arithmetic_is_that_of_the_tensors(name, dtype):
    fmt = FORMATS[name]
    layout = fmt.layout(16, 32, dtype)
    encoded = fmt.encode(pages(4, dtype=dtype), {})
    assert set(encoded.slot) == set(layout.slot)
    assert set(encoded.scale_set) == set(layout.scale_set)
    for given, described, lead in (
        (encoded.slot, layout.slot, (4, PAGE)),
        (encoded.scale_set, layout.scale_set, (None,)),
    ):
        for field, x in given.items():
            assert x.dtype == described[field].dtype
            assert tuple(x.shape[len(lead) :]) == described[field].shape
            if lead[0] is not None:
                assert tuple(x.shape[: len(lead)]) == lead
    stored = sum(
        x.numel() * x.itemsize for x in (*encoded.slot.values(), *encoded.scale_set.values())
    )
    ids = 4 * (PAGE // TILE) * 4 if encoded.scale_set else 0  # an int32 per tile
    assert 4 * layout.page_nbytes() == stored + ids


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_stored_bytes_per_element(name, dtype):
    fmt = FORMATS[name]
    layout, encoded = fmt.layout(64, 64, dtype), fmt.encode(pages(1, 64, 64, dtype), {})
    fields = {**layout.slot, **layout.scale_set}
    for part in ("key", "value"):
        stored = sum(
            x.numel() * x.itemsize
            for field, x in (*encoded.slot.items(), *encoded.scale_set.items())
            if fields[field].part == part
        )
        assert layout.bits(part, 64) == 8 * stored / (PAGE * 64)


@pytest.mark.parametrize(
    ("name", "width", "key", "value"),
    [
        ("int4", 128, 4.25, 4.25),
        ("int4", 64, 4.5, 4.5),
        ("int4_channel", 128, 4.5, 4.25),
        ("int4_channel", 64, 4.5, 4.5),
        ("dense", 64, 16, 16),
    ],
)
def test_published_bits(name, width, key, value):
    layout = FORMATS[name].layout(width, width, torch.float16)
    assert layout.bits("key", width) == key
    assert layout.bits("value", width) == value


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_gives_the_models_dtype_and_shape(name, dtype):
    fmt, batch = FORMATS[name], pages(3, dtype=dtype)
    keys, values = read(fmt, fmt.encode(batch, {}), dtype, 1)
    assert keys.dtype == values.dtype == dtype
    assert keys.shape == (PAGE, 16)
    assert values.shape == (PAGE, 32)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_are_encoded_independently(name):
    """A page's codes do not depend on its neighbours: rows cannot influence each other."""
    fmt, batch = FORMATS[name], pages(3)
    together = fmt.encode(batch, {})
    loud = pages(3)
    loud.keys[0] *= 1000
    loud.values[0] *= 1000
    for encoded, page in ((fmt.encode(loud, {}), 1), (fmt.encode(loud, {}), 2)):
        for got, want in zip(
            read(fmt, encoded, torch.float32, page),
            read(fmt, together, torch.float32, page),
            strict=True,
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", FORMATS)
def test_encode_is_pure_and_deterministic(name):
    fmt, batch = FORMATS[name], pages(2)
    keys, values = batch.keys.clone(), batch.values.clone()
    first, second = fmt.encode(batch, {}), fmt.encode(batch, {})
    assert torch.equal(batch.keys, keys)
    assert torch.equal(batch.values, values)
    for field, x in first.slot.items():
        assert torch.equal(x, second.slot[field])


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.movable])
def test_slots_of_movable_formats_decode_in_any_order(name):
    fmt, batch = FORMATS[name], pages(1)
    encoded = fmt.encode(batch, {})
    order = torch.randperm(PAGE, generator=torch.Generator().manual_seed(4))
    keys, values = fmt.decode({n: x[0] for n, x in encoded.slot.items()}, {}, torch.float32)
    mixed = fmt.decode({n: x[0][order] for n, x in encoded.slot.items()}, {}, torch.float32)
    assert torch.equal(mixed[0], keys[order])
    assert torch.equal(mixed[1], values[order])


@pytest.mark.parametrize("name", FORMATS)
def test_decode_reads_batches_of_runs(name):
    """`[B, H, S]` slots at once equal page by page."""
    fmt, batch = FORMATS[name], pages(4)
    encoded = fmt.encode(batch, {})
    slot = {n: x.view(2, 1, 2 * PAGE, *x.shape[2:]) for n, x in encoded.slot.items()}
    sets = {}
    if encoded.scale_set:
        ids = encoded.set_of.long().repeat_interleave(PAGE // TILE).view(2, 1, -1)
        sets = {n: x[ids] for n, x in encoded.scale_set.items()}
    keys, values = fmt.decode(slot, sets, torch.float32)
    each = [read(fmt, encoded, torch.float32, i) for i in range(4)]
    assert torch.equal(keys.flatten(), torch.stack([k for k, _ in each]).flatten())
    assert torch.equal(values.flatten(), torch.stack([v for _, v in each]).flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_dense_is_bitwise(dtype, rope):
    fmt = type(FORMATS["dense"])(rope=rope)
    batch = pages(2, dtype=dtype)
    keys, values = read(fmt, fmt.encode(batch, {}), dtype, 1)
    assert torch.equal(keys, batch.keys[1])
    assert torch.equal(values, batch.values[1])
    assert fmt.pre_rope == (rope == "pre")


def test_dense_takes_odd_widths_and_refuses_other_rotations():
    dense = type(FORMATS["dense"])
    assert dense().layout(7, 3, torch.float32).page_nbytes() == PAGE * 10 * 4
    with pytest.raises(ValueError, match=r"dense\(rope='mid'\).*'post' or 'pre'"):
        dense(rope="mid")


@pytest.mark.parametrize("name", ["int4", "int4_channel"])
@pytest.mark.parametrize("widths", [(15, 16), (16, 15)])
def test_odd_widths_are_refused(name, widths):
    with pytest.raises(ValueError, match=f"{name}.*{widths[0]} and {widths[1]} must be even"):
        FORMATS[name].layout(*widths, torch.float32)


# -- accuracy, against the quantizer's definition, one group at a time ---------------------------


def group_error(x):
    """Half a step of the group's fp16 scale, and what rounding scale and minimum may clip."""
    step, low = float(x.max() - x.min()) / 15, abs(float(x.min()))
    half = torch.finfo(torch.float16).eps / 2
    return step / 2 * (1 + 2 * half) + half * (15 * step + 2 * low)


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_int4_error_is_bounded_per_token(offset):
    fmt, batch = FORMATS["int4"], pages(3)
    batch.keys += offset
    encoded = fmt.encode(batch, {})
    for page in range(3):
        both = read(fmt, encoded, torch.float32, page)
        for got, want in zip(both, (batch.keys[page], batch.values[page]), strict=True):
            for slot in range(PAGE):
                assert (got[slot] - want[slot]).abs().max() <= group_error(want[slot])


def test_int4_channel_error_is_bounded_per_channel():
    """An outlier channel costs only itself."""
    fmt, batch = FORMATS["int4_channel"], pages(2)
    batch.keys[..., 5] *= 100
    encoded = fmt.encode(batch, {})
    for page in range(2):
        keys, values = read(fmt, encoded, torch.float32, page)
        for c in range(16):
            want = batch.keys[page, :, c]
            assert (keys[:, c] - want).abs().max() <= group_error(want)
        for slot in range(PAGE):
            want = batch.values[page, slot]
            assert (values[slot] - want).abs().max() <= group_error(want)


@pytest.mark.parametrize("name", ["int4", "int4_channel"])
def test_constant_channels_and_zero_pages(name):
    fmt, batch = FORMATS[name], pages(2)
    batch.keys[0], batch.values[0] = 0.0, 0.0
    batch.keys[1, :, 3] = 2.0
    encoded = fmt.encode(batch, {})
    keys, values = read(fmt, encoded, torch.float32, 0)
    assert not keys.any()
    assert not values.any()
    if name == "int4_channel":
        assert (read(fmt, encoded, torch.float32, 1)[0][:, 3] == 2.0).all()


@pytest.mark.parametrize("name", ["int4", "int4_channel"])
def test_huge_numbers_stay_finite_and_local(name):
    fmt, batch = FORMATS[name], pages(2, dtype=torch.bfloat16)
    calm = fmt.encode(batch, {})
    batch.keys[0, 7, 2] = 1e30
    batch.values[0, 7, 2] = -1e30
    encoded = fmt.encode(batch, {})
    keys, values = read(fmt, encoded, torch.bfloat16, 0)
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()
    calm_keys, calm_values = read(fmt, calm, torch.bfloat16, 0)
    others = torch.arange(PAGE) != 7
    assert torch.equal(values[others], calm_values[others])
    if name == "int4":
        assert torch.equal(keys[others], calm_keys[others])
    else:
        channels = torch.arange(16) != 2
        assert torch.equal(keys[:, channels], calm_keys[:, channels])


def test_int4_codes_are_the_quantizers():
    fmt, batch = FORMATS["int4"], pages(1)
    encoded = fmt.encode(batch, {})
    codes, scale, low = _nibbles.quantize(batch.keys, dim=-1)
    assert torch.equal(_nibbles.unpack(encoded.slot["key_codes"]).float(), codes)
    assert torch.equal(encoded.slot["key_scale"], torch.cat([scale, low], -1))

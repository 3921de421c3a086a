"""The 4-bit quantizer and its packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.formats import _nibbles

FP16 = torch.finfo(torch.float16)
FP32 = torch.finfo(torch.float32)
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)


@SETTINGS
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 40))
def test_pack_and_unpack_are_inverse(seed, rows, half):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2 * half), generator=generator).float()
    packed = _nibbles.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, half)
    assert torch.equal(_nibbles.unpack(packed).float(), codes)


def test_every_pair_of_codes_has_a_byte_of_its_own():
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    packed = _nibbles.pack(codes)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(_nibbles.unpack(packed), codes.to(torch.uint8))


def test_layout_of_the_nibbles():
    """Low nibble: the first half of the channels; kernels depend on it."""
    assert _nibbles.pack(torch.tensor([[1, 2, 3, 4]])).tolist() == [[0x31, 0x42]]


def ulp16(x):
    """Distance between neighbouring fp16 numbers around `x`."""
    return torch.maximum(x.abs() * FP16.eps, torch.tensor(FP16.smallest_normal * FP16.eps))


def check(x, dim, dtype_rounding=0.0):
    """Error at most half a step, plus what rounding scale and minimum to fp16 clips at the ends."""
    codes, scale, low = _nibbles.quantize(x, dim)
    assert scale.dtype == low.dtype == torch.float16
    assert codes.min() >= 0
    assert codes.max() <= 15
    assert torch.equal(codes, codes.round())
    back = _nibbles.dequantize(codes, scale, low)
    assert torch.isfinite(back).all()
    x, step, start = x.double(), scale.double(), low.double()
    stop = start + 15 * step
    outside = torch.maximum((start - x).clamp_min(0), (x - stop).clamp_min(0))
    rounding = 4 * FP32.eps * (x.abs() + 15 * step)
    assert ((back.double() - x).abs() <= step / 2 + outside + rounding).all()
    return outside, step, start


@SETTINGS
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.01, 1.0, 300.0]),
    st.sampled_from([0.0, 1.0, -50.0, 1000.0]),
    st.sampled_from([-1, 1]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_half_a_step_within_the_range(seed, spread, offset, dim, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 8, 6, generator=generator) * spread + offset).to(dtype)
    outside, _, start = check(x, dim)
    low, high = x.double().amin(dim, True), x.double().amax(dim, True)
    clip_low = ulp16(low) / 2  # a rounded minimum
    clip_high = 15 * ulp16((high - start) / 15) / 2  # a rounded scale
    assert (outside <= torch.maximum(clip_low, clip_high) * (1 + FP16.eps)).all()


@SETTINGS
@given(st.integers(0, 10**6), st.sampled_from([-1, 1]))
def test_numbers_on_the_grid_survive_exactly(seed, dim):
    """Codes times a power of two plus an fp16 minimum: nothing is lost."""
    codes = torch.randint(0, 16, (4, 16, 16), generator=torch.Generator().manual_seed(seed))
    codes.select(dim, 0).fill_(0)
    codes.select(dim, 1).fill_(15)
    x = codes.float() * 0.25 - 3.5
    got, scale, low = _nibbles.quantize(x, dim)
    assert torch.equal(got, codes.float())
    assert torch.equal(_nibbles.dequantize(got, scale, low), x)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-8, 1234.0, 65504.0, -65504.0])
def test_a_constant_is_its_own_minimum(value):
    x = torch.full((2, 8), value)
    codes, scale, low = _nibbles.quantize(x, -1)
    back = _nibbles.dequantize(codes, scale, low)
    assert (back - x).abs().max() <= ulp16(torch.tensor(value)) / 2
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e5, -1e5, 1e30])
def test_numbers_beyond_fp16_saturate_and_stay_finite(dtype, value):
    x = torch.linspace(-1, 1, 16).repeat(2, 1).to(dtype)
    x[0, 3] = value
    codes, scale, low = _nibbles.quantize(x, -1)
    back = _nibbles.dequantize(codes, scale, low)
    assert torch.isfinite(back).all()
    assert torch.isfinite(scale).all()
    assert torch.isfinite(low).all()
    # the other slice does not notice
    alone = _nibbles.dequantize(*_nibbles.quantize(x[1:], -1))
    assert torch.equal(back[1:], alone)


def test_the_whole_fp16_range_is_covered():
    """The widest span of an fp16 model: codes still reach both ends."""
    x = torch.tensor([[-65504.0, 65504.0, 0.0, 100.0]])
    check(x, -1)
    codes, _, _ = _nibbles.quantize(x, -1)
    assert codes[0, :2].tolist() == [0.0, 15.0]


def test_quantizing_does_not_change_its_input():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    _nibbles.quantize(x, -1)
    assert torch.equal(x, before)

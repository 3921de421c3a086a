"""Rotation as multiplication of complex numbers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.positions import RopeSpec

FP32 = torch.finfo(torch.float32).eps
PAIRINGS = ["half", "interleaved"]
SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)


def spec_of(n_rot, pairing="half", scale=1.0, base=10000.0):
    inv_freq = base ** -(torch.arange(0, n_rot, 2).double() / n_rot)
    return RopeSpec(inv_freq.float(), n_rot, pairing, scale)


def pairs(spec):
    half = spec.n_rot // 2
    if spec.pairing == "half":
        return [(i, i + half) for i in range(half)]
    return [(2 * i, 2 * i + 1) for i in range(half)]


def turned(spec, x, positions, scale=1.0):
    """Each pair as a complex number times `scale * e^(i * position * frequency)`."""
    out = x.double().clone()
    for f, (a, b) in enumerate(pairs(spec)):
        angle = positions.double() * spec.inv_freq[f].double()
        number = torch.complex(x[..., a].double(), x[..., b].double())
        number = number * torch.polar(torch.full_like(angle, scale), angle)
        out[..., a], out[..., b] = number.real, number.imag
    return out


def bound(spec, x, positions, scale=1.0):
    """An angle rounded to fp32 is off by its size times epsilon; a few roundings come on top."""
    angle = float(positions.double().abs().max()) * float(spec.inv_freq.max())
    return FP32 * (angle + 4) * 2 * scale * float(x.abs().max())


def close(got, want, limit):
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert float((got.double() - want.double()).abs().max()) <= limit


@st.composite
def calls(draw):
    width = draw(st.sampled_from([4, 8, 80]))
    n_rot = draw(st.sampled_from([2, width // 4 // 2 * 2 or 2, width]))
    spec = spec_of(n_rot, draw(st.sampled_from(PAIRINGS)), draw(st.sampled_from([1.0, 0.7, 1.35])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    B, H, T = (draw(st.integers(1, 3)) for _ in range(3))
    x = torch.randn(B, H, T, width, generator=generator)
    farthest = draw(st.sampled_from([2, 100, 5000]))
    positions = torch.randint(0, farthest, (B, H, T), generator=generator)
    return spec, x, positions


@SETTINGS
@given(calls())
def test_rotate_is_complex_multiplication(call):
    spec, x, positions = call
    want = turned(spec, x, positions, spec.scale)
    close(spec.rotate(x, positions), want, bound(spec, x, positions, max(1.0, spec.scale)))


@SETTINGS
@given(calls())
def test_unrotate_inverts_rotate(call):
    spec, x, positions = call
    limit = bound(spec, x, positions, max(1.0, spec.scale))
    close(spec.unrotate(spec.rotate(x, positions), positions), x, 2 * limit / min(1.0, spec.scale))


@SETTINGS
@given(calls(), st.integers(-300, 300))
def test_shift_moves_a_rotated_key_without_scaling_it_again(call, by):
    spec, x, positions = call
    moved = spec.shift(spec.rotate(x, positions), torch.full_like(positions, by))
    reach = positions.abs() + abs(by)
    limit = 3 * bound(spec, x, reach, max(1.0, spec.scale))
    close(moved, turned(spec, x, positions + by, spec.scale), limit)


@SETTINGS
@given(calls())
def test_channels_beyond_n_rot_are_untouched(call):
    spec, x, positions = call
    for out in (
        spec.rotate(x, positions),
        spec.unrotate(x, positions),
        spec.shift(x, positions),
    ):
        assert torch.equal(out[..., spec.n_rot :], x[..., spec.n_rot :])


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("n_rot", [8, 32])
@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_logits_depend_on_distance_alone(pairing, n_rot, scale):
    """Rotating the query back by d is the same as moving every key ahead by d."""
    spec = spec_of(n_rot, pairing, scale)
    generator = torch.Generator().manual_seed(5)
    query, keys = torch.randn(1, 32, generator=generator), torch.randn(9, 32, generator=generator)
    at, places = torch.tensor([700]), torch.arange(9) * 70
    want = turned(spec, query, at, scale) @ turned(spec, keys, places, scale).T
    rotated = spec.rotate(query, at), spec.rotate(keys, places)
    limit = 32 * scale * bound(spec, torch.maximum(query, keys).abs(), at + 500, scale)
    limit *= float(torch.cat([query, keys]).abs().max())
    for d in (0, 1, 123, 500):
        back = spec.shift(rotated[0], torch.tensor([-d])) @ spec.rotate(keys, places - d).T
        assert float((back.double() - want).abs().max()) <= 3 * limit
        ahead = rotated[0] @ spec.shift(rotated[1], torch.full((9,), d)).T
        moved = spec.shift(rotated[0], torch.tensor([-d])) @ rotated[1].T
        assert float((ahead - moved).abs().max()) <= 3 * limit


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_fractional_positions(pairing):
    """A centroid lies between tokens: half a step twice is a step."""
    spec = spec_of(8, pairing)
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[[0.5, 12.25, 99.75]]])
    got = spec.rotate(x, positions.expand(1, 2, 3))
    close(got, turned(spec, x, positions.expand(1, 2, 3)), bound(spec, x, positions))
    twice = spec.shift(spec.shift(x, torch.full((3,), 0.5)), torch.full((3,), 0.5))
    close(twice, turned(spec, x, torch.ones(3)), 2 * bound(spec, x, torch.ones(1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rotated_in_fp32(dtype):
    spec = spec_of(16)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    positions = torch.arange(7) + 3000  # beyond what bf16 can count
    close(spec.rotate(x, positions), turned(spec, x, positions), bound(spec, x, positions))


def test_low_precision_frequencies_and_int32_positions_are_taken():
    spec = RopeSpec(torch.tensor([1.0, 0.25], dtype=torch.bfloat16), 4)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([9], dtype=torch.int32)
    close(spec.rotate(x, positions), turned(spec, x, positions), bound(spec, x, positions))


def test_position_zero_is_the_identity():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(3, dtype=torch.long)
    assert torch.equal(spec_of(8).rotate(x, zero), x)
    assert torch.equal(spec_of(8, scale=2.0).shift(x, zero), x)
    assert torch.equal(spec_of(8, scale=2.0).rotate(x, zero), 2 * x)


def test_the_input_is_not_changed():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    spec = spec_of(6, "interleaved", 1.5)
    spec.rotate(x, torch.arange(3))
    spec.unrotate(x, torch.arange(3))
    spec.shift(x, torch.arange(3))
    assert torch.equal(x, before)


def test_the_two_pairings_differ():
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    half, interleaved = (spec_of(8, p).rotate(x, torch.tensor([3])) for p in PAIRINGS)
    assert not torch.allclose(half, interleaved)


def test_bad_specs_are_refused():
    with pytest.raises(ValueError, match="pairing='neox': use 'half' or 'interleaved'"):
        RopeSpec(torch.ones(2), 4, "neox")
    with pytest.raises(ValueError, match="2 frequencies rotate 4 channels, not n_rot=8"):
        RopeSpec(torch.ones(2), 8)


def test_copies_of_a_cache_share_the_spec():
    spec = spec_of(8)
    assert copy.deepcopy(spec) is spec


@SETTINGS
@given(calls(), st.sampled_from([1, 2, 33]))
def test_average_is_the_mean_of_rotations(call, count):
    spec, x, positions = call
    want = sum(turned(spec, x, positions + i, spec.scale) for i in range(count)) / count
    limit = bound(spec, x, positions + count, max(1.0, spec.scale))
    close(spec.average(x, positions, count), want, limit)

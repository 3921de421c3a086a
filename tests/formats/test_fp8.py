"""FP8 against all numbers that e4m3 has, written out from the definition."""

from __future__ import annotations

import pytest
import torch

from kvloom.core.format import PAGE
from kvloom.formats.fp8 import Fp8
from tests.formats.reading import Cell, place_of

HALF = torch.finfo(torch.float16)


def e4m3_numbers() -> list[float]:
    """Not negative, ascending: 2^-6 m/8 below the normal ones, 2^(e-7) (1 + m/8) above."""
    small = [2.0**-6 * m / 8 for m in range(8)]
    normal = [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)]
    return [*small, *normal[:-1]]  # the last pattern is not a number


def nearest(x: float, numbers: list[float]) -> float:
    """Ties go to the even pattern."""
    best = min(range(len(numbers)), key=lambda i: (abs(abs(x) - numbers[i]), i % 2))
    return numbers[best] if x >= 0 else -numbers[best]


def naive(token: list[float], numbers: list[float]) -> list[float]:
    peak = torch.tensor(max(abs(x) for x in token) / 448)
    scale = float(peak.clamp(1e-7, HALF.max).half())
    return [scale * nearest(max(-448, min(448, x / scale)), numbers) for x in token]


@pytest.mark.parametrize("width", [5, 16, 80])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_every_number_is_the_nearest(width, size):
    numbers = e4m3_numbers()
    assert len(numbers) == 127 and numbers[-1] == 448
    keys, values = size * torch.randn(1, PAGE, width), size * torch.randn(1, PAGE, width) ** 3
    for x, got in zip(
        (keys, values), Cell(Fp8(), place_of(width, width)).read(keys, values), strict=True
    ):
        for t in range(0, PAGE, 7):
            want = torch.tensor(naive(x[0, t].tolist(), numbers))
            torch.testing.assert_close(got[0, t], want, rtol=1e-6, atol=0)


def test_precision_is_relative_down_to_the_smallest_normal_number():
    """A loud channel leaves the others their precision: 2^-4 as long as they are 2^-14 of it."""
    x = torch.randn(1, PAGE, 64)
    x[:, :, 9] = 500
    got, _ = Cell(Fp8(), place_of(64, 64)).read(x, x)
    loud = x.abs() >= 500 * 2.0**-14 * 1.01
    assert bool(((got - x).abs() <= 2.0**-4 * x.abs() * 1.001)[loud].all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_stay_finite_and_local(dtype):
    x = torch.randn(1, PAGE, 16).to(dtype)
    calm, _ = Cell(Fp8(), place_of(16, 16)).read(x, x)
    x[0, 3, 1] = torch.finfo(dtype).max
    x[0, 4] = 0
    got, _ = Cell(Fp8(), place_of(16, 16)).read(x, x)
    assert bool(torch.isfinite(got).all()) and not bool(got[0, 4].any())
    others = [t for t in range(PAGE) if t not in (3, 4)]
    assert torch.equal(got[0, others], calm[0, others])


def test_bits_are_8_and_a_scale_per_token():
    layout = Fp8().layout(128, 64, torch.float16)
    assert layout.bits("key", 128) == 8.125 and layout.bits("value", 64) == 8.25

"""TurboQuant: the codebook against Lloyd's and Max's conditions, vectors against naive look-ups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvloom.core.format import PAGE
from kvloom.core.recipe import Recipe
from kvloom.formats import _hadamard
from kvloom.formats._levels import lloyd_max as levels
from kvloom.formats.turboquant import TurboquantMSE
from tests.formats.reading import Cell, place_of

CPU = torch.device("cpu")
# mean squared error of the best quantizers of a normal variable: 2, 3 and 4 bits
DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497}


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def integral(f, a: float, b: float, steps: int = 4000) -> float:
    h = (b - a) / steps
    return h * sum(f(a + (i + 0.5) * h) for i in range(steps))


@pytest.mark.parametrize("bits", DISTORTION)
def test_the_codebook_is_the_lloyd_max_quantizer(bits):
    """Every level is the mean of its cell, whose borders lie halfway to the next levels."""
    level = levels(bits, CPU).tolist()
    assert len(level) == 2**bits and level == sorted(level)
    torch.testing.assert_close(torch.tensor(level), -torch.tensor(level[::-1]), rtol=0, atol=1e-6)
    border = [-9.0, *((a + b) / 2 for a, b in itertools.pairwise(level)), 9.0]
    error = 0.0
    for c, a, b in zip(level, border, border[1:], strict=False):
        mean = integral(lambda x: x * density(x), a, b) / integral(density, a, b)
        assert c == pytest.approx(mean, abs=1e-5)
        error += integral(lambda x, c=c: (x - c) ** 2 * density(x), a, b)
    assert error == pytest.approx(DISTORTION[bits], rel=2e-3)


def naive(vector: list[float], level: list[float]) -> list[float]:
    """A rotated vector there and back: nearest levels, and the norm of the original."""
    norm = math.sqrt(sum(x * x for x in vector))
    unit = [x / norm * math.sqrt(len(vector)) for x in vector]
    near = [min(level, key=lambda c, u=u: abs(c - u)) for u in unit]
    scale = float(torch.tensor(norm / math.sqrt(sum(c * c for c in near))).half())
    return [scale * c for c in near]


@pytest.mark.parametrize("bits", DISTORTION)
@pytest.mark.parametrize("width", [16, 80])
def test_vectors_are_looked_up_in_the_rotated_basis(bits, width):
    fmt = TurboquantMSE(bits=bits, value_bits=2)
    cell = Cell(fmt, place_of(width, width, heads=2), head=1)
    keys, values = torch.randn(1, PAGE, width) * 7, torch.randn(1, PAGE, width) + 2
    read = cell.read(keys, values)
    for name, b, x, got in zip(("key", "value"), (bits, 2), (keys, values), read, strict=True):
        signs, level = cell.tables[f"{name}_signs"], levels(b, CPU).tolist()
        turned = _hadamard.turn(x[0], signs)
        for t in range(0, PAGE, 5):
            want = _hadamard.turn_back(torch.tensor([naive(turned[t].tolist(), level)]), signs)
            torch.testing.assert_close(got[0, t], want[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", DISTORTION)
def test_relative_error_is_the_codebooks(bits):
    """Of unit vectors in any direction, as in the paper: .117, .03, .009 for 2, 3, 4 bits.

    Unit vectors of a finite width have shorter tails than the normal distribution, which takes off a
    little at many bits; the norm correction adds a little at few.
    """
    x = torch.randn(8, PAGE, 128)
    got, _ = Cell(TurboquantMSE(bits=bits), place_of(128, 128)).read(x, x)
    error = float(((got - x).norm(dim=-1) / x.norm(dim=-1)).pow(2).mean())
    assert 0.95 * DISTORTION[bits] < error < 1.07 * DISTORTION[bits]


@pytest.mark.parametrize("bits", DISTORTION)
def test_norms_are_exact_but_for_fp16(bits):
    x = torch.randn(1, PAGE, 64) * torch.logspace(-2, 3, PAGE)[:, None]
    x[0, 5, 7] = 1e4
    for got in Cell(TurboquantMSE(bits=bits), place_of(64, 64)).read(x, x):
        ratio = got.norm(dim=-1) / x.norm(dim=-1)
        assert float((ratio - 1).abs().max()) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extremes_stay_finite_and_local(dtype):
    x = torch.randn(1, PAGE, 16).to(dtype)
    calm, _ = Cell(TurboquantMSE(), place_of(16, 16)).read(x, x)
    x[0, 3, 1] = torch.finfo(dtype).max
    x[0, 4] = 0
    got, _ = Cell(TurboquantMSE(), place_of(16, 16)).read(x, x)
    assert bool(torch.isfinite(got).all()) and not bool(got[0, 4].any())
    others = [t for t in range(PAGE) if t not in (3, 4)]
    assert torch.equal(got[0, others], calm[0, others])


def test_bits_are_codes_and_a_number_per_token():
    layout = TurboquantMSE(value_bits=2).layout(128, 64, torch.float16)
    assert layout.bits("key", 128) == 4.125 and layout.bits("value", 64) == 2.25


@pytest.mark.parametrize(
    "text", ["bits=8", "bits=1", "bits=4.0", "value_bits=8", "value_bits=4.0", "seed=-1"]
)
def test_bad_parameters_are_refused(text):
    with pytest.raises(ValueError, match=r"is one of|is an int"):
        Recipe.parse(f"turboquant_mse({text})")

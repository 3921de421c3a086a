"""Uniform grids against their equations, one group at a time, and what the rotation changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvloom.core.format import PAGE
from kvloom.core.recipe import Recipe
from kvloom.formats import _grid, _hadamard
from tests.formats.reading import LARGEST, TINY, Cell, fp16, fp16_below, place_of

HALF_ULP = torch.finfo(torch.float16).eps / 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTHS = [1, 5, 16, 64, 80, 96, 128, 256]


def grid_of(group: torch.Tensor, bits: int, symmetric: bool) -> tuple[float, float, int, int]:
    """Scale, zero and the range of codes of one group, from the equations, parameters in fp16."""
    if symmetric:
        half = 2 ** (bits - 1)
        scale = max(abs(x) for x in group.tolist()) / (half - 1)
        return max(fp16(max(scale, 1e-7)), TINY), 0.0, -half, half - 1
    top = 2**bits - 1
    zero = fp16_below(min(group.tolist()))
    scale = (max(group.tolist()) - zero) / top
    return max(fp16(max(scale, 1e-7)), TINY), zero, 0, top


def check_group(got: torch.Tensor, want: torch.Tensor, bits: int, symmetric: bool, ulp: float):
    """Half a step from what is in range, all of it but for the rounding of scale and zero."""
    scale, zero, low, high = grid_of(want, bits, symmetric)
    reach = torch.tensor([zero + low * scale, zero + high * scale]).double()
    inside = want.double().clamp(reach[0], reach[1])
    slack = ulp * (want.abs().double() + scale) + 1e-6 * (abs(zero) + high * scale)
    assert bool(((got.double() - inside).abs() <= scale / 2 + slack).all())
    # and everything is in range but for the rounding of two fp16 numbers
    lost = (want.double() - inside).abs().max()
    rounding = HALF_ULP * high * scale + high * TINY  # of the scale; zero is rounded down
    if float(want.abs().max()) < LARGEST / 2:
        assert float(lost) <= rounding * 1.01


def groups_of(per: str, x: torch.Tensor, group: int, channels: int):
    """Index of every group of a page `[64, W]` that shares a scale."""
    width = x.shape[1]
    if per == "channel":
        return [(slice(s, s + group), c) for c in range(width) for s in range(0, PAGE, group)]
    step = channels or width
    return [(t, slice(c, min(c + step, width))) for t in range(PAGE) for c in range(0, width, step)]


def check_page(fmt, keys: torch.Tensor, values: torch.Tensor) -> None:
    """One page through the format; every group of it against the equations."""
    cell = Cell(fmt, place_of(keys.shape[1], values.shape[1]))
    got = cell.read(keys[None], values[None])
    ulp = torch.finfo(keys.dtype).eps
    sides = [(fmt.keys, fmt.bits, keys), (fmt.values, fmt.value_bits or fmt.bits, values)]
    for (per, bits, x), back in zip(sides, got, strict=True):
        assert back.dtype == x.dtype and bool(torch.isfinite(back).all())
        for where in groups_of(per, x, fmt.group, fmt.channels):
            check_group(back[0][where].float(), x[where].float(), bits, fmt.symmetric, ulp)


# magnitudes, offsets and outliers of what a page may hold
KINDS = ("gaussian", "offset", "outlier", "constant", "zero", "tiny", "large")


def content(kind: str, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(PAGE, width, generator=generator)
    if kind == "offset":
        x = x + 40
    elif kind == "outlier":
        x[7] *= 100
        x[:, width // 2] = 1e4 * torch.randn(PAGE, generator=generator)
    elif kind == "constant":
        x[:, width // 3] = 2.0
        x[5] = -3.0
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "tiny":
        x = x * 1e-5
    elif kind == "large":
        x = x * 1e4
    return x


@st.composite
def recipes(draw):
    given = {
        "value_bits": draw(st.sampled_from([None, 8, 4, 3, 2])),
        "keys": draw(st.sampled_from(["token", "channel"])),
        "values": draw(st.sampled_from(["token", "channel"])),
        "symmetric": draw(st.booleans()),
        "group": draw(st.sampled_from([32, 64])),
        "channels": draw(st.sampled_from([0, 32, 64])),
    }
    axes = (given["keys"], given["values"])
    given |= {} if "channel" in axes else {"group": 64}
    given |= {} if "token" in axes else {"channels": 0}
    name = draw(st.sampled_from(["int8", "int4", "int3", "int2"]))
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    text=recipes(),
    dtype=st.sampled_from(list(DTYPES)),
    widths=st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    seed=st.integers(0, 9),
)
@example("int4(channels=32)", "float16", (80, 80), ("outlier", "constant"), 0)
@example("int4(keys='channel', group=32)", "bfloat16", (80, 96), ("outlier", "offset"), 0)
@example("int3(symmetric=True, values='channel')", "float32", (64, 256), ("large", "tiny"), 0)
def test_error_is_half_a_step(text, dtype, widths, kinds, seed):
    fmt = Recipe.parse(text).format
    keys, values = (
        content(kind, width, seed + i).to(DTYPES[dtype])
        for i, (kind, width) in enumerate(zip(kinds, widths, strict=True))
    )
    check_page(fmt, keys, values)


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_are_those_of_the_equations(bits, symmetric, per):
    """Against naive rounding, group by group; ties aside, the same levels exactly."""
    group = ", group=32" if per == "channel" else ""
    fmt = Recipe.parse(f"int{bits}(keys={per!r}, symmetric={symmetric}{group})").format
    keys, values = content("gaussian", 16, 0), content("offset", 16, 1)
    (got,), _ = Cell(fmt, place_of(16, 16)).read(keys[None], values[None])
    for where in groups_of(per, keys, 32, 0):
        scale, zero, low, high = grid_of(keys[where], bits, symmetric)
        naive = [
            zero + scale * min(max(round((x - zero) / scale), low), high)
            for x in keys[where].tolist()
        ]
        torch.testing.assert_close(got[where], torch.tensor(naive), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_bias_costs_no_step(bits, axis):
    """The least number of a group is in range, wherever it lies between two of fp16."""
    x = content("gaussian", 64, 3) * 0.01 + torch.linspace(39, 41, 64)[:, None] + torch.zeros(64)
    x = x if axis == "token" else x.T.contiguous()
    (got,), _ = Cell(Recipe.parse(f"int{bits}(keys={axis!r})").format, place_of(64, 64)).read(
        x[None], x[None]
    )
    for where in groups_of(axis, x, 64, 0):
        part = x[where]
        below = part.max() - fp16_below(float(part.min()))
        step = below / (2**bits - 1) * (1 + 2 * HALF_ULP)
        top = HALF_ULP * below  # the last code falls short by as much
        assert float((got[where] - part).abs().max()) <= step / 2 + top + 1e-5


def test_floor_half_is_the_next_number_below():
    small, plain, large = (0.0, 1e-9, 5e-8, 6.2e-8), (1.0, 1.0001, 40.02), (65504.0, 1e30)
    numbers = [sign * x for x in (*small, *plain, *large) for sign in (1, -1)]
    for x, got in zip(numbers, _grid.floor_half(torch.tensor(numbers)).tolist(), strict=True):
        assert got == fp16_below(x), x


# -- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int4", "int8(symmetric=True)", "int2(keys='channel')"])
def test_constant_channels_and_zero_pages_are_exact(text):
    fmt = Recipe.parse(text).format
    zeros = torch.zeros(1, PAGE, 16)
    for x in Cell(fmt, place_of(16, 16)).read(zeros, zeros):
        assert not bool(x.any())
    if not fmt.symmetric:
        flat = torch.full((1, PAGE, 16), 2.0)
        for x in Cell(fmt, place_of(16, 16)).read(flat, flat):
            assert bool((x == 2.0).all())


@pytest.mark.parametrize("text", ["int4", "int8(symmetric=True)", "int4(keys='channel', group=32)"])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_numbers_stay_finite_and_local(text, size):
    """An outlier costs those that share its scale, and nobody else."""
    fmt = Recipe.parse(text).format
    keys, values = (torch.randn(1, PAGE, 16).bfloat16() for _ in range(2))
    calm = Cell(fmt, place_of(16, 16)).read(keys, values)
    keys[0, 7, 2], values[0, 7, 2] = size, -size
    got = Cell(fmt, place_of(16, 16)).read(keys, values)
    for per, x, before in zip((fmt.keys, fmt.values), got, calm, strict=True):
        assert bool(torch.isfinite(x).all())
        others = torch.ones(PAGE, 16, dtype=torch.bool)
        if per == "token":
            others[7] = False
        else:
            others[: fmt.group, 2] = False
        assert torch.equal(x[0][others], before[0][others])


@pytest.mark.parametrize("text", ["int4", "int8(symmetric=True)", "int4(hadamard='both')"])
def test_the_largest_fp16_numbers_do_not_become_infinite(text):
    """Rounding a scale up leads past the end of fp16."""
    fmt = Recipe.parse(text).format
    x = torch.full((1, PAGE, 16), LARGEST).half()
    x[:, :, ::2] *= -1
    for back in Cell(fmt, place_of(16, 16)).read(x, x):
        assert bool(torch.isfinite(back).all())


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("int4(value_bits=5)", "value_bits is one of"),
        ("int4(value_bits=1)", "value_bits is one of"),
        ("int4(keys='row')", "'token' or 'channel'"),
        ("int4(group=16)", "group is 32 or 64"),
        ("int4(channels=16)", "multiple of 32"),
        ("int4(channels=-32)", "multiple of 32"),
        ("int4(symmetric='yes')", "symmetric is True or False"),
        ("int4(hadamard='values')", "hadamard is"),
        ("int4(seed=-1)", "seed is an int"),
        ("int4(value_bits=4.0)", "value_bits is one of"),
        ("int4(value_bits=True)", "value_bits is one of"),
        ("int4(keys='channel', group=32.0)", "group is 32 or 64"),
        ("int4(channels=32.0)", "multiple of 32"),
        ("int4(group=32)", "all scales are per token"),
        ("int4(keys='channel', values='channel', channels=32)", "all scales are per channel"),
        ("int4(seed=3)", "seed is of a rotation"),
    ],
)
def test_bad_parameters_are_refused_with_the_rule(text, rule):
    with pytest.raises(ValueError, match=rule):
        Recipe.parse(text)


# -- rotation ------------------------------------------------------------------------------------

ORDERS = [1, 2, 12, 20, 16, 40, 48, 64, 80, 96, 128, 160, 256]


@pytest.mark.parametrize("width", [*ORDERS, 5, 6, 18, 72, 112, 192, 576])
def test_the_rotation_is_orthonormal(width):
    made = _hadamard.matrix(width).double()
    torch.testing.assert_close(made @ made.T, torch.eye(width).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", ORDERS)
def test_whole_rotations_spread_every_channel_evenly(width):
    """Hadamard matrices: all entries have one magnitude, so an outlier goes everywhere."""
    torch.testing.assert_close(
        _hadamard.matrix(width).abs(), torch.full((width, width), width**-0.5)
    )


def test_widths_without_a_hadamard_matrix_are_made_of_blocks():
    made = _hadamard.matrix(72)
    assert bool((made[:64, 64:] == 0).all()) and bool((made[64:, :64] == 0).all())
    assert torch.equal(made[:64, :64], _hadamard.matrix(64))
    assert torch.equal(made[64:, 64:], _hadamard.matrix(8))


@pytest.mark.parametrize("width", [5, 64, 80, 96, 128])
def test_turning_keeps_dot_products_and_can_be_undone(width):
    signs = _hadamard.signs(place_of(width, width, heads=2), width, 0, torch.device("cpu"))
    x, y = torch.randn(2, 3, width), torch.randn(2, 3, width)
    turned = [_hadamard.turn(v, signs[:, None]) for v in (x, y)]
    torch.testing.assert_close((turned[0] * turned[1]).sum(-1), (x * y).sum(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(_hadamard.turn_back(turned[0], signs[:, None]), x, atol=1e-5, rtol=0)


def test_signs_are_those_of_the_seed_the_layer_and_the_head():
    cpu, here = torch.device("cpu"), place_of(64, 64, heads=3)
    signs = _hadamard.signs(here, 64, 0, cpu)
    assert signs.shape == (3, 64) and signs.dtype == torch.int8
    assert torch.equal(signs, _hadamard.signs(here, 64, 0, cpu))
    assert set(signs.flatten().tolist()) == {-1, 1}
    other_layer = type(here)(1, 2, 3, 64, 64)
    rows = [*signs, *_hadamard.signs(here, 64, 1, cpu), *_hadamard.signs(other_layer, 64, 0, cpu)]
    assert len({tuple(row.tolist()) for row in rows}) == 9


@pytest.mark.parametrize("width", [64, 80, 96])
@pytest.mark.parametrize("which", ["keys", "both"])
def test_rotated_formats_are_the_grid_in_another_basis(width, which):
    """Error bound in the coded domain: turn both sides, and the equations hold there."""
    plain, fmt = Recipe.parse("int4").format, Recipe.parse(f"int4(hadamard={which!r})").format
    cell = Cell(fmt, place_of(width, width, heads=2), head=1)
    x, y = content("outlier", width, 0), content("gaussian", width, 1)
    keys, values = (v[0] for v in cell.read(x[None], y[None]))
    sides = [(x, keys, "key_signs"), (y, values, "value_signs")]
    for before, after, name in sides:
        if name in cell.tables:
            before, after = (_hadamard.turn(v, cell.tables[name]) for v in (before, after))
        for t in range(PAGE):
            scale, zero, _, top = grid_of(before[t], plain.bits, False)
            bound = scale / 2 + 2 * HALF_ULP * (abs(zero) + top * scale)
            assert float((after[t] - before[t]).abs().max()) <= bound * 1.01


def test_the_rotation_spreads_an_outlier_channel():
    """What it is for: keys with a loud channel keep their other channels."""
    x = content("gaussian", 64, 0)
    x[:, 3] *= 30
    errors = {}
    for text in ("int4", "int4(hadamard='keys')"):
        got, _ = Cell(Recipe.parse(text).format, place_of(64, 64)).read(x[None], x[None])
        errors[text] = float((got[0] - x).pow(2).mean())
    assert errors["int4(hadamard='keys')"] < errors["int4"] / 2

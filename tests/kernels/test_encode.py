"""Pages coded and packed by the C++ kernels: bit by bit what the torch of the formats makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import Recipe
from kvloom.core.format import PAGE, PageBatch
from kvloom.formats import _levels, fp8
from kvloom.formats._grid import Grid
from kvloom.formats._streaming_codes import Channels
from kvloom.kernels import cpu_backend, cpu_encode, ops
from tests.formats.reading import place_of, tensors

pytestmark = pytest.mark.skipif(
    ops.cpu_refusal() is not None, reason=f"no C++ kernels: {ops.cpu_refusal()}"
)
ISAS = cpu_backend.module().instruction_sets() if cpu_backend.module() else []
WIDTHS = st.sampled_from([16, 36, 64, 80, 96, 128, 256])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = st.sampled_from(["normal", "loud", "constant", "tiny"])


def pages(n, width, dtype, kind, seed=0):
    x = torch.randn(n, PAGE, width, generator=torch.Generator().manual_seed(seed))
    if kind == "loud":
        x[:, ::5, ::3] *= 1e4
    return {"constant": x.round(), "tiny": x * 1e-6}.get(kind, x).to(dtype)


def served_by(name, isa, make):
    """What `make()` returns with a backend, as at the start of a process."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KVLOOM_BACKEND", name)
            patch.setenv("KVLOOM_ISA", isa)
            reset()
            return make()
    finally:
        reset()


def reset():
    cpu_backend.reset()
    ops.forced_backend.cache_clear()


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), name


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    isa=st.sampled_from(ISAS),
    bits=st.sampled_from([8, 4, 3, 2]),
    part=st.sampled_from(["key", "value"]),
    per=st.sampled_from(["token", "channel"]),
    symmetric=st.booleans(),
    group=st.sampled_from([32, 64]),
    channels=st.sampled_from([0, 32, 64]),
    width=WIDTHS,
    dtype=DTYPES,
    kind=KINDS,
)
def test_uniform_grids(isa, bits, part, per, symmetric, group, channels, width, dtype, kind):
    grid = Grid(part, bits, per, symmetric, group, channels)
    x = pages(3, width, dtype, kind, seed=bits)
    got = served_by("cpu", isa, lambda: grid._by_kernels(x))
    want = grid._by_torch(x)
    for g, w in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert g.shape == w.shape
        assert torch.equal(g, w)


RECIPES = [
    "fp8", "turboquant_mse", "turboquant_mse(bits=3, value_bits=2)", "kvquant", "kvquant(bits=3)",
    "kvquant(bits=2, outliers=0)", "streaming_kvquant(rope='post')",
    "streaming_kvquant(rope='post', key_bits=8, value_bits=3, value_groups=2)",
    "streaming_kvquant(rope='post', key_bits=2, adaptive=True, chunk=128)",
]  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    isa=st.sampled_from(ISAS),
    recipe=st.sampled_from(RECIPES),
    widths=st.tuples(WIDTHS, WIDTHS),
    dtype=DTYPES,
    kind=KINDS,
)
def test_other_formats(isa, recipe, widths, dtype, kind):
    fmt = Recipe.parse(recipe).format
    tables = fmt.tables(place_of(*widths, heads=3), torch.device("cpu"))
    for name in ("key_bounds", "value_bounds"):  # as calibrations give them: each head its own
        if name in tables:
            tables[name] = tables[name] * torch.tensor([[1.0], [0.7], [1.3]])
    head = torch.tensor([0, 0, 0, 1, 2, 2])
    keys, values = (pages(6, width, dtype, kind, seed=i) for i, width in enumerate(widths))

    def encode():
        batch = PageBatch(keys, values, torch.zeros(6, dtype=torch.int64), head, 1, 3, tables)
        return tensors(fmt.encode(batch, {}))

    assert_equal(served_by("cpu", isa, encode), served_by("torch", isa, encode))


@pytest.mark.parametrize("isa", ISAS)
def test_every_number_of_16_bits_as_fp8(isa):
    """Tokens whose largest number is 448, so that their scale is 1."""
    numbers = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.abs() <= fp8.LARGEST]
    rows = numbers.new_zeros(-(-len(numbers) // 255) * 255)
    rows[: len(numbers)] = numbers
    rows = torch.cat([rows.view(-1, 255), rows.new_full((len(rows) // 255, 1), 448)], 1)
    x = torch.cat([rows, rows.new_full((-len(rows) % PAGE, 256), 448)]).view(-1, PAGE, 256)
    codes, scales = served_by("cpu", isa, lambda: cpu_encode.by_peaks(x, True))
    want = fp8._by_torch(x, True)
    assert bool((scales == 1).all())
    assert torch.equal(scales, want[1])
    assert torch.equal(codes, want[0])


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_on_a_bound_belong_below_it(isa):
    bounds = _levels.between(_levels.lloyd_max(3, torch.device("cpu")))
    x = bounds[torch.arange(2 * PAGE * 32) % 7].view(2, PAGE, 32)
    heads = {"key_bounds": bounds[None], "value_bounds": bounds[None]}
    owner = torch.zeros(2, dtype=torch.int64)
    got, want = (
        served_by(name, isa, lambda: _levels.encode(x, x, heads, owner))
        for name in ("cpu", "torch")
    )
    assert_equal(got, want)


def test_a_page_of_no_row_is_refused():
    x = torch.zeros(2, PAGE, 32)
    with pytest.raises(ValueError, match=r"\(2,\) places of 2 pages must be among 1 rows"):
        cpu_encode.by_scales(x, torch.ones(1, 32).half(), torch.tensor([0, 1]), 4, True)
    with pytest.raises(ValueError, match="must be among 3 rows"):
        cpu_encode.by_levels(x, torch.zeros(3, 7), torch.tensor([0]), True)


def test_what_does_not_fit_is_refused():
    x, none = torch.zeros(2, PAGE, 32), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"scales: \(1, 16\) should be \(1, 32\)"):
        cpu_encode.by_scales(x, torch.ones(1, 16).half(), none, 4, True)
    for wrong in (5, 255):
        with pytest.raises(ValueError, match=rf"bounds of 2 to 4 bits: \(1, {wrong}\) should be"):
            cpu_encode.by_levels(x, torch.zeros(1, wrong), none, True)
    with pytest.raises(ValueError, match=r"levels: \(4,\) should be \(8,\)"):
        cpu_encode.by_levels(x, torch.zeros(1, 7), none, True, torch.zeros(4))


def test_the_kernels_are_what_serves_by_default(monkeypatch):
    """Each of the functions is reached: the tests above do not compare torch with torch."""
    reached = []
    for name in ("by_scales", "by_levels", "by_peaks"):
        given_ = getattr(cpu_encode, name)
        spy = lambda *a, f=given_, n=name: (reached.append(n), f(*a))[1]  # noqa: E731
        monkeypatch.setattr(cpu_encode, name, spy)
    x, none = pages(1, 64, torch.float32, "normal"), torch.zeros(1, dtype=torch.int64)
    for recipe in ("fp8", "turboquant_mse", "kvquant"):
        fmt = Recipe.parse(recipe).format
        tables = fmt.tables(place_of(64, 64), torch.device("cpu"))
        fmt.encode(PageBatch(x, x, none, none, 1, 1, tables), {})
    Channels("key", 4, 0, 0, 8).encode(x, none, torch.ones(1, 64), None)
    assert reached == ["by_peaks"] * 2 + ["by_levels"] * 4 + ["by_scales"]

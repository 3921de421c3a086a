"""The Triton kernels against float64 over decoded entries: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")  # tests/conftest.py switches its interpreter on where there is no GPU

from kvloom.core import paged
from kvloom.core.attend import attend, attention_mass, partials
from kvloom.core.compaction import compact
from kvloom.core.format import PAGE
from kvloom.formats import _hadamard
from kvloom.formats._grid import Grid
from kvloom.kernels import ops, reference, triton_backend
from kvloom.kernels.layout import Codes, tile_nbytes
from tests.kernels import interpreter, stores
from tests.kernels.test_cpu import OTHERS, UNIFORM, assert_close

if triton_backend.interpreted():
    interpreter.prepare()

WITHOUT_ROTATION = 2e-6
ROTATED = 2e-5  # position times frequency is rounded to fp32, as in the model itself


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KVLOOM_BACKEND", "triton")
    ops.forced_backend.cache_clear()
    yield
    monkeypatch.undo()
    ops.forced_backend.cache_clear()


def filled(*recipe, **shape):
    """`stores.filled`, by other kernels: these are slow in the interpreter, and not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVLOOM_BACKEND")
        ops.forced_backend.cache_clear()
        store = stores.filled(*recipe, **shape)
    ops.forced_backend.cache_clear()
    return store


def attended(store, call):
    """Pages, tail and sinks by the kernels, told anew."""
    return ops.combine(paged.Paged().attend(store, call))


def tolerance(store):
    return ROTATED if store.plan.pre_rope else WITHOUT_ROTATION


FORMATS = UNIFORM + OTHERS
WIDTHS = (64, 80, 96, 128, 256)
HALVES = [(dtype, D) for D in WIDTHS for dtype in (torch.float16, torch.bfloat16)]
# every format in a half precision, every half precision at every width with three formats
COVERED = [(recipe, *HALVES[i % len(HALVES)]) for i, recipe in enumerate(FORMATS)]
OTHERWISE = [(r, *h) for r in FORMATS for h in HALVES if (r, *h) not in COVERED]
EXACTLY = [(recipe, WIDTHS[i % len(WIDTHS)]) for i, recipe in enumerate(FORMATS)]


def short_of(recipe):
    """Tokens that fill one page, or two where some stay exact."""
    return 204 if "kivi" in recipe else 76


@pytest.mark.parametrize(("recipe", "D"), EXACTLY)
def test_every_format(recipe, D):
    store = filled(recipe, H=1, G=3, D=D, n=short_of(recipe))
    assert store.pool.slabs
    call = stores.call_of(store, G=3)
    assert_close(attended(store, call), stores.exact(store, call), tolerance(store))


@pytest.mark.parametrize(
    ("recipe", "dtype", "D"),
    COVERED + [pytest.param(*case, marks=pytest.mark.full) for case in OTHERWISE],
)
def test_half_precision_is_as_good_as_naive(recipe, dtype, D):
    """At most twice the error of plain attention over the decoded entries in the same dtype."""
    store = filled(recipe, H=1, D=D, n=short_of(recipe), dtype=dtype)
    call = stores.call_of(store)
    want, _ = stores.exact(store, call)
    read = [x.to(dtype) for x in stores.decoded(store, store.pool.slabs[0])]
    keys, values = (torch.cat([x, t[:, :, : store.tail.longest]], 2)
                    for x, t in zip(read, (store.tail.keys, store.tail.values), strict=True))  # fmt: skip
    if store.sinks is not None:
        keys = torch.cat([store.sinks.keys, keys], 2)
        values = torch.cat([store.sinks.values, values], 2)
    logits = call.query @ keys[:, :, None].mT * call.scale
    naive = logits.softmax(-1) @ values[:, :, None]
    got, _ = attended(store, call)
    error = (got.double() - want).abs().max()
    rounding = torch.finfo(dtype).eps * values.abs().max()
    assert error <= 2 * (naive.double() - want).abs().max() + rounding


@pytest.mark.parametrize("D", [16, 36])
@pytest.mark.parametrize("recipe", ["none", "int4(channels=32)", "int3(keys='channel')", "kvquant"])
def test_odd_widths(recipe, D):
    store = filled(recipe, H=1, D=D, n=76)
    call = stores.call_of(store)
    assert_close(attended(store, call), stores.exact(store, call), tolerance(store))


@pytest.mark.parametrize(("recipe", "Q"), [("none", 16), ("int8", 5)])
def test_short_queries_and_wide_groups(recipe, Q):
    """Up to 16 queries of 7 heads: more than one block of rows."""
    store = filled(recipe, B=2, H=1, G=7, D=32, n=200)
    call = stores.call_of(store, G=7, Q=Q)
    assert_close(attended(store, call), stores.exact(store, call))


@pytest.mark.parametrize("recipe", ["dense(unpaged=0)", "int4", "int4(keys='channel')", "kvquant"])
@pytest.mark.parametrize("evict", ["knorm | ada",
                                   "streaming_llm(sinks=3, positions='original') | lazy(every=50)"])  # fmt: skip
def test_dead_slots_ragged_heads_and_scattered_positions(recipe, evict):
    chain = f"{evict} | {recipe}"
    store = filled(chain, B=2, H=2, D=32, n=500, budget="200tok")
    assert store.pool.slabs
    call = stores.call_of(store)
    assert_close(attended(store, call), stores.exact(store, call), tolerance(store))


@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_softcap_and_long_logits(recipe):
    store = filled(recipe, H=1, n=150)
    call = stores.call_of(store, softcap=20.0, scale=1.0)
    assert_close(attended(store, call), stores.exact(store, call), 1e-5)


def test_sink_logits_take_part_once(environment_of):
    store = filled("streaming_llm(sinks=2) | int8", n=150, budget="120tok")
    call = stores.call_of(store, sink_logits=torch.tensor([[1.0, -2.0], [8.0, 0.0]]))
    want, _ = environment_of("reference", lambda: attend(store, call, None))
    assert_close([attend(store, call, None)[0]], [want.double()], 5e-6)


def test_masses_weigh_entries():
    store = filled("knorm | mass_fold(weight='count') | int8", n=400, budget="200tok")
    assert any("mass" in slab.meta and slab.meta["mass"].any() for slab in store.pool.slabs)
    call = stores.call_of(store)
    assert_close(attended(store, call), stores.exact(store, call))


@pytest.mark.parametrize(("recipe", "Q"), [("h2o | int8", 1), ("h2o | dense(unpaged=0)", 3),
                                           ("h2o | int4(hadamard='keys', channels=32)", 5),
                                           ("h2o | kvquant", 2), ("h2o | int4", 40)])  # fmt: skip
def test_attention_that_entries_receive(environment_of, recipe, Q):
    """By the kernels from the pages, or from a decoded workspace where queries are many."""
    store = filled(recipe, B=2, n=260, D=32, budget="150tok")
    call = stores.call_of(store, Q=Q, voters=torch.tensor([[True], [False]]).expand(2, Q))
    call.voters = call.voters | (torch.arange(Q) == Q - 1)
    lse = environment_of("reference", lambda: ops.combine(partials(store, call, None))[1])
    want = environment_of("reference", lambda: attention_mass(store, call, None, lse))
    got = attention_mass(store, call, None, lse)
    assert got.shape[2] > store.tail.longest > 0
    assert_close([got], [want.double()], max(1e-5, tolerance(store)))


def test_many_slabs_take_one_launch():
    store = filled("int4", n=700, chunk=64)
    assert len(store.pool.slabs) > 2
    call = stores.call_of(store)
    assert_close(attended(store, call), stores.exact(store, call))


def test_nothing_to_see_is_minus_infinity():
    store = filled("int4", n=64)
    for slab in store.pool.slabs:
        slab.alive = torch.zeros(*slab.first.shape, slab.pages * PAGE, dtype=torch.bool)
    out, lse = attended(store, stores.call_of(store))
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("recipe", ["streaming_llm(sinks=4)", "streaming_llm(sinks=4) | int4"])
def test_sinks_are_read_with_shifted_queries(environment_of, recipe):
    """Positions in the cache: the sinks' query is turned, in the same launch."""
    store = filled(recipe, n=300, budget="150tok")
    assert store.plan.in_cache and store.sinks is not None
    call = stores.call_of(store)
    want = environment_of("reference", lambda: ops.combine(partials(store, call, None)))
    got = ops.combine(partials(store, call, None))
    assert_close(got, [x.double() for x in want], 5e-6)


@pytest.mark.parametrize("recipe", ["mp_kvm(max_centroids=9) | int4", "mp_kvm(positions='positionless')",
                                    "knorm | mean_centroid | int8"])  # fmt: skip
def test_centroids_attend_as_the_reference_does(environment_of, recipe):
    store = filled(recipe, n=300, D=32, budget="200tok")
    assert store.centroids.longest
    call = stores.call_of(store)
    want = environment_of("reference", lambda: ops.combine(partials(store, call, None)))
    (got,) = partials(store, call, None)
    assert_close(got, [x.double() for x in want], 5e-6)


@pytest.fixture
def environment_of(monkeypatch):
    """What a call returns with another backend."""

    def run(backend, call):
        with monkeypatch.context() as patch:
            patch.setenv("KVLOOM_BACKEND", backend)
            ops.forced_backend.cache_clear()
            found = call()
        ops.forced_backend.cache_clear()
        return found

    return run


def test_what_changed_is_told_again():
    store = filled("streaming_llm | int4", H=1, n=200, budget="150tok")
    known = paged.of(store)
    for step in range(2):
        keys, values = stores.entries(1, 1, 40, 64, seed=step)
        positions = torch.arange(200 + 40 * step, 240 + 40 * step)[None]
        call = stores.call_of(store)
        store.commit(store.stage(keys, values, call, None, positions))
        got = ops.combine(known.attend(store, call))
        assert_close(attended(store, call), [x.double() for x in got], 1e-7)


def test_a_forced_backend_says_why_it_cannot():
    store = filled("int4", n=100)
    assert "matrix products" in paged.why_not(store, stores.call_of(store, Q=40))
    call = replace(stores.call_of(store), past_mask=torch.ones(1, 1, 1, 100, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"KVLOOM_BACKEND=triton cannot serve.*a mask addresses"):
        partials(store, call, None)


def test_reasons(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert triton_backend.why_not(cuda, torch.float16, 128, False) is None
    assert "wider than" in triton_backend.why_not(cuda, torch.float16, 1024, False)
    assert "float64" in triton_backend.why_not(cuda, torch.float64, 64, False)
    assert "interpreter" in triton_backend.why_not(cpu, torch.float16, 64, False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter" in triton_backend.why_not(cpu, torch.float16, 64, True)
    monkeypatch.setenv("KVLOOM_BACKEND", "torch")
    ops.forced_backend.cache_clear()
    assert ops.triton_why_not(cuda, torch.float16, 64) == "KVLOOM_BACKEND=torch"


def test_addresses_are_checked():
    with pytest.raises(ValueError, match=r"contiguous tensor at a multiple of 16 bytes.*\(3, 4\)"):
        triton_backend.address(torch.zeros(4, 3).T)


LONG = ["int3(keys='channel')", "fp8", "kvquant", "streaming_kvquant",
        "streaming_kvquant(value_bits=16)", "turboquant_mse"]  # fmt: skip


@pytest.mark.parametrize("recipe", [*LONG, "knorm | ada | int4", "knorm | ada | kvquant"])
def test_long_queries_read_a_decoded_workspace(recipe):
    store = filled(recipe, D=32, n=150, budget="120tok" if "ada" in recipe else None)
    call = stores.call_of(store, Q=40)
    assert store.pool.slabs and paged.why_not(store, call)
    got = ops.combine(partials(store, call, None))
    assert_close(got, stores.exact(store, call), max(5e-6, tolerance(store)))
    keys, values = paged.Paged().read(store, store.pool.slabs[0])
    for x, want in zip((keys, values), read(store, store.pool.slabs[0]), strict=True):
        assert_close([x], [want.double()], 1e-6)


def read(store, slab):
    """What torch reads of a slab, zeros where a (row, head) has fewer pages."""
    widths = store.plan.key_dim, store.plan.value_dim
    found = [torch.zeros(*slab.first.shape, slab.pages * PAGE, w) for w in widths]
    for segment in slab.segments():
        for x, got in zip(found, store.pool.read(segment, slab), strict=True):
            x[segment.rows, segment.heads, : got.shape[2]] = got
    return found


GRIDS = [
    Grid("key", 8), Grid("value", 8, symmetric=True, channels=32), Grid("key", 4, "channel"),
    Grid("value", 4), Grid("key", 3, "channel", True, 32), Grid("value", 3, channels=32),
    Grid("key", 2, channels=32), Grid("value", 2, "channel"), Grid("value", 3, "channel", True),
]  # fmt: skip


GRIDDED = [(grid, (36, 80, 128)[i % 3]) for i, grid in enumerate(GRIDS)]
REST = [(g, w) for g in GRIDS for w in (36, 80, 128) if (g, w) not in GRIDDED]


@pytest.mark.parametrize(
    ("grid", "width"), GRIDDED + [pytest.param(*case, marks=pytest.mark.full) for case in REST]
)
def test_pages_are_encoded_bit_by_bit_as_torch_does(grid, width):
    x = torch.randn(2, 64, width, generator=torch.Generator().manual_seed(width))
    x[:, ::5, ::3] *= 1e4
    x[1] = x[1].round()
    got, want = grid._by_kernels(x, triton_backend.encode), grid._by_torch(x)
    for g, w in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert g.shape == w.shape
        assert torch.equal(g, w)


@pytest.mark.parametrize("grid", [Grid("key", 4), Grid("value", 2, "channel")], ids=str)
def test_rotation_before_encoding(grid):
    """Sums are fp32, not fp64: a code may be the next one where a number lies between two."""
    signs = torch.tensor([[1, -1] * 32, [-1, -1, 1, 1] * 16], dtype=torch.int8)
    heads = torch.tensor([1, 0], dtype=torch.int32)
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1))
    turned = _hadamard.transform(x * signs[heads.long()][:, None])

    def fused(*given):
        triton_backend.encode(*given, turned=(signs, _hadamard.matrix(64), heads))

    got, want = grid._by_kernels(x, fused), grid._by_torch(turned)
    codes = [grid.codes(c, 64).int() for c in (got[0], want[0])]
    assert (codes[0] - codes[1]).abs().max() <= 1
    assert (codes[0] != codes[1]).float().mean() < 1e-3
    for g, w in zip(got[1], want[1], strict=True):
        assert torch.allclose(g.float(), w.float(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", ["rotated_int4", "int2(keys='channel', hadamard='both')"])
def test_sealing_rotates_in_the_same_launch(monkeypatch, recipe):
    """What is stored is as near to what came as torch's own codes are."""
    made, encode = [], triton_backend.encode
    monkeypatch.setattr(
        triton_backend, "encode", lambda *x, **turned: (made.append(turned), encode(*x, **turned))
    )
    keys, values = stores.entries(1, 2, 64, 64)
    layers = [stores.filled(recipe, n=64), filled(recipe, n=64)]
    rotated = layers[0].plan.format.rotated
    assert [bool(found) for found in made] == [part in rotated for part in ("key", "value")]
    errors = [
        [
            (x - y).square().mean()
            for x, y in zip(store.pool.decode_all(), (keys, values), strict=True)
        ]
        for store in layers
    ]
    for got, want in zip(*errors, strict=True):
        assert abs(got - want) <= 1e-2 * want


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize(
    ("bits", "part"), [(8, "value"), (4, "key"), (3, "key"), (3, "value"), (2, "value")]
)
def test_slots_keep_their_codes_when_they_move(bits, part, width):
    codec, generator = Codes(part, bits, width), torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (2, 3, 2, 32, width), generator=generator)
    old = [codec.pack(x) for x in codes.to(torch.uint8)]
    slabs = torch.randint(-1, 2, (64,), generator=generator, dtype=torch.int32)
    slots = torch.randint(0, 192, (64,), generator=generator, dtype=torch.int32)
    got = torch.full((1, 2, tile_nbytes(width, bits)), 255, dtype=torch.uint8)
    triton_backend.move_codes(old, slabs, slots, got, codec)
    from_slab = codes.flatten(1, 3)[slabs.clamp_min(0).long(), slots.long()]
    want = torch.where((slabs >= 0)[:, None], from_slab, 0)
    assert torch.equal(codec.unpack(got).reshape(-1, width).long(), want)


@pytest.mark.parametrize("recipe", ["int3", "turboquant_mse(bits=2)"])
def test_compaction_moves_codes_by_the_kernel(monkeypatch, recipe):
    """Bit by bit what torch makes of the same pages."""
    two = [filled(f"knorm | {recipe}", H=1, D=36, n=140, budget="1000tok") for _ in range(2)]
    moved, move = [], triton_backend.move_codes
    monkeypatch.setattr(triton_backend, "move_codes", lambda *x: (moved.append(x), move(*x)))
    for store, backend in zip(two, ("torch", "triton"), strict=True):
        monkeypatch.setenv("KVLOOM_BACKEND", backend)
        ops.forced_backend.cache_clear()
        keep = torch.rand(1, 1, 128, generator=torch.Generator().manual_seed(1)) < 0.4
        store.pool.evict(keep)
        compact(store.pool)
    assert len(moved) == 2  # keys and values
    (want,), (got,) = (store.pool.slabs for store in two)
    assert got.used.tolist() == want.used.tolist() == [[1]]
    for name, x in want.tile.items():
        assert torch.equal(got.tile[name], x)


@pytest.mark.parametrize("ema", [None, 0.9, 0.0])
def test_tokens_join_centroids_as_the_reference_says(ema):
    generator = torch.Generator().manual_seed(7)
    slots, rows = (torch.rand(*n, 70, generator=generator) for n in ((3 * 8,), (3, 5)))
    at = torch.randint(0, 3, (3, 5), generator=generator) + 8 * torch.arange(3)[:, None]
    mass = torch.randint(0, 4, (3, 5), generator=generator).float()
    got = ops.join_centroids(slots, at, rows, mass, 65, ema)
    want = reference.join_centroids(slots, at, rows, mass, 65, ema)
    assert (mass == 0).any()
    assert_close([got], [want.double()], 1e-6)


@pytest.mark.parametrize("update", ["mean", "ema"])
def test_mp_kvm_joins_by_the_kernel(monkeypatch, update):
    """The same centroids as in torch."""
    recipe = f"mp_kvm(max_centroids=6, similarity_threshold=0.2, block=5, update='{update}')"
    joined, join = [], triton_backend.join_centroids
    monkeypatch.setattr(
        triton_backend, "join_centroids", lambda *x: (joined.append(1), join(*x))[1]
    )
    want, got = (fill(recipe, H=1, D=8, n=90, budget="60tok") for fill in (filled, stores.filled))
    assert joined
    assert got.centroids.count.equal(want.centroids.count)
    assert_close([got.centroids.keys], [want.centroids.keys.double()], 1e-5)
    assert_close([got.centroids.meta["mass"].exp()], [want.centroids.meta["mass"].exp().double()])

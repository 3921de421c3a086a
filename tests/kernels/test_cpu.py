"""The C++ kernels: every format where it lies, against float64 over decoded entries."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import CompressedCache
from kvloom.core.attend import attend, attention_mass, partials
from kvloom.core.format import PAGE
from kvloom.core.native import why_not
from kvloom.kernels import cpu_backend, library, ops
from kvloom.positions.rope import RopeSpec
from tests.kernels import stores

pytestmark = pytest.mark.skipif(
    ops.cpu_refusal() is not None, reason=f"no C++ kernels: {ops.cpu_refusal()}"
)
ISAS = cpu_backend.module().instruction_sets() if cpu_backend.module() else []
UNIFORM = [
    "int8", "int4", "int3", "int2", "int4(symmetric=True)", "int8(keys='channel')",
    "int4(keys='channel', values='channel')", "int3(keys='channel', group=32, symmetric=True)",
    "int4(channels=32)", "int2(hadamard='both')", "int4(hadamard='keys')", "int8(value_bits=4)",
    "kivi", "kivi(bits=4)", "streaming_kvquant(rope='pair', detect=False)",
    "streaming_kvquant(rope='post', detect=False, value_groups=2)",
]  # fmt: skip
OTHERS = [
    "none", "dense(rope='pre')", "fp8", "turboquant_mse", "turboquant_mse(bits=3)",
    "turboquant_mse(bits=2, value_bits=4)", "kvquant", "kvquant(bits=3)",
    "kvquant(bits=2, outliers=0)", "streaming_kvquant", "streaming_kvquant(rope='post')",
    "streaming_kvquant(key_outlier_bits=16, value_outlier_bits=16)",
    "streaming_kvquant(value_bits=16)", "streaming_kvquant(key_bits=16)",
]  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Set a variable as at the start of a process."""

    def put(name, value):
        monkeypatch.setenv(name, value)
        cpu_backend.reset()
        ops.forced_backend.cache_clear()

    yield put
    monkeypatch.undo()
    cpu_backend.reset()
    ops.forced_backend.cache_clear()


def assert_close(got, want, tolerance=2e-6):
    """Relative to the largest number, as fp32 sums are."""
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isinf(), w.isinf())
        w = w.nan_to_num(neginf=0.0)
        difference = (g.double().nan_to_num(neginf=0.0) - w).abs().max()
        assert difference <= tolerance * w.abs().max().clamp_min(1), difference


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recipe", UNIFORM + OTHERS)
def test_every_format_on_every_instruction_set(environment, recipe, isa):
    environment("KVLOOM_ISA", isa)
    store = stores.filled(recipe, H=2, G=3)
    call = stores.call_of(store, G=3)
    assert_close(stores.native(store, call), stores.exact(store, call))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("G", [1, 3, 6, 9])  # by vectors of channels, or of tokens
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(("turned", "D"), [(12, 64), (32, 64), (48, 64), (64, 64), (32, 36)])
@pytest.mark.parametrize("recipe", ["dense(rope='pre')", "streaming_kvquant"])
def test_rotations_of_any_pairing_and_part(environment, recipe, turned, D, pairing, G, isa):
    environment("KVLOOM_ISA", isa)
    frequencies = 10_000 ** -torch.linspace(0, 1, turned // 2)
    rope = RopeSpec(frequencies, turned, pairing, scale=1.2)
    store = stores.filled(recipe, G=G, D=D, n=150, rope=rope)
    call = stores.call_of(store, G=G)
    assert_close(stores.native(store, call), stores.exact(store, call))


@pytest.mark.parametrize("D", [16, 36, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("recipe", ["none", "dense(rope='pre')", "int4(channels=32)", "int3(keys='channel')",
                                    "turboquant_mse", "kvquant", "streaming_kvquant"])  # fmt: skip
def test_widths(recipe, D):
    store = stores.filled(recipe, D=D, n=200)
    call = stores.call_of(store)
    got, want = stores.native(store, call), stores.exact(store, call)
    naive = stores.exact(store, call, torch.float32)
    for g, n, w in zip(got, naive, want, strict=True):  # logits are sums over the width
        assert_close(
            [g], [w], max(1e-6, 4 * float((n - w).abs().max() / w.abs().max().clamp_min(1)))
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    recipe=st.sampled_from(
        ["none", "dense(rope='pre')", "int8", "int4(keys='channel')", "fp8", "streaming_kvquant"]
    ),
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    G=st.integers(1, 9),
    Q=st.integers(1, 16),
    n=st.integers(1, 400),
    chunk=st.sampled_from([1, 64, 100, 400]),
)
def test_shapes(recipe, B, H, G, Q, n, chunk):
    store = stores.filled(recipe, B, H, G, 32, n, chunk=max(chunk, n // 20))
    call = stores.call_of(store, G, Q)
    assert_close(stores.native(store, call), stores.exact(store, call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "recipe", ["none", "dense(rope='pre')", "int8", "kvquant", "streaming_kvquant(value_bits=16)"]
)
def test_half_precision_entries_are_read_exactly(recipe, dtype):
    store = stores.filled(recipe, dtype=dtype)
    call = stores.call_of(store)
    assert_close(stores.native(store, call), stores.exact(store, call))


@pytest.mark.parametrize("recipe", [
    "dense(unpaged=0)", "dense(rope='pre')", "int4", "int4(keys='channel')", "kvquant",
])  # fmt: skip
@pytest.mark.parametrize(
    "evict", ["random", "knorm | ada", "streaming_llm(sinks=3) | lazy(every=50)"]
)
def test_dead_slots_ragged_heads_and_scattered_positions(recipe, evict):
    store = stores.filled(f"{evict} | {recipe}", B=2, H=3, n=700, budget="300tok")
    assert store.pool.slabs
    call = stores.call_of(store)
    assert_close(stores.native(store, call), stores.exact(store, call))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recipe", ["int4", "streaming_kvquant"])
def test_sinks_at_places_in_the_cache(environment, recipe, isa):
    """Their queries are turned back over the gap that eviction left."""
    environment("KVLOOM_ISA", isa)
    store = stores.filled(f"streaming_llm(sinks=3, recent=200) | {recipe}", B=2, H=3, n=700)
    assert int(store.sink_gap().min()) > 400
    call = stores.call_of(store, Q=3)
    assert_close(stores.native(store, call), stores.exact(store, call))


@pytest.mark.parametrize("placing", ["mean", "slot", "positionless"])
def test_centroids_take_part(environment, placing):
    recipe = f"mp_kvm(max_centroids=9, positions='{placing}') | int4"
    store = stores.filled(recipe, B=2, n=500, budget="300tok")
    assert store.centroids.longest
    found = []
    for backend in ("reference", "cpu"):
        environment("KVLOOM_BACKEND", backend)
        call = stores.call_of(store, Q=2)
        call.positions = torch.tensor([[500, 501]] * 2)
        found.append(attend(store, call, None)[0])
    assert_close(found[1:], [found[0].double()], 2e-5)


@pytest.mark.parametrize("recipe", ["none", "h2o | int4", "mp_kvm(max_centroids=9)"])
def test_learned_sinks_of_a_model(environment, recipe):
    store = stores.filled(recipe, n=400, budget=None if recipe == "none" else "300tok")
    found = []
    for backend in ("reference", "cpu"):
        environment("KVLOOM_BACKEND", backend)
        call = stores.call_of(store)
        call.sink_logits = torch.tensor([[3.0, -1.0], [0.5, 40.0]])
        found.append(attend(store, call, None))
    assert_close(found[1][:1], [found[0][0].double()], 2e-5)
    if store.plan.observes:
        assert_close(found[1][1:], [found[0][1].double()], 2e-5)


@pytest.mark.parametrize("recipe", ["none", "int4", "fp8"])
def test_softcap_and_long_logits(recipe):
    store = stores.filled(recipe)
    call = stores.call_of(store, softcap=20.0, scale=1.0)
    assert_close(stores.native(store, call), stores.exact(store, call), 1e-5)


def test_masses_weigh_entries():
    chain = "knorm | mass_fold(weight='count') | int8"
    store = stores.filled(chain, n=600, budget="300tok")
    assert any("mass" in slab.meta and slab.meta["mass"].any() for slab in store.pool.slabs)
    call = stores.call_of(store)
    assert_close(stores.native(store, call), stores.exact(store, call))


def test_nothing_to_see_is_minus_infinity():
    store = stores.filled("int4", n=64)
    for slab in store.pool.slabs:
        slab.alive = torch.zeros(*slab.first.shape, slab.pages * PAGE, dtype=torch.bool)
    out, lse = stores.native(store, stores.call_of(store))
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "recipe",
    ["h2o", "h2o | dense(unpaged=0)", "h2o | int4", "h2o | lazy(every=16) | int4(hadamard='both')"],
)
def test_attention_received_without_reading_keys_again(environment, recipe):
    store = stores.filled(recipe, B=2, n=500, budget="400tok")
    received = []
    for backend in ("torch", "cpu"):
        environment("KVLOOM_BACKEND", backend)
        call = stores.call_of(store, Q=3)
        call.voters = torch.tensor([[True, False, True], [True, True, True]])
        lse = ops.combine(partials(store, call, None))[1]
        received.append(attention_mass(store, call, None, lse))
        assert store.native.raw is None
    assert received[0].shape == received[1].shape
    assert_close(received[1:], [received[0].double()])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("recipe", "share"),
    [("int8", 0.05), ("int8(keys='channel')", 0.05), ("int4", 0.005), ("int4(keys='channel')", 0.005),
     ("int3", 0.005), ("int2", 0.005)],
)  # fmt: skip
def test_integer_queries_add_little_to_the_error_of_quantization(environment, recipe, share, isa):
    if isa == "vnni" and recipe in ("int3", "int2"):
        share = 0.02  # weights of 7 bits there, for speed
    environment("KVLOOM_CPU_MODE", "default")
    environment("KVLOOM_ISA", isa)
    dense, store = (stores.filled(r, H=4, G=4, D=128, n=2048, chunk=2048) for r in ("none", recipe))
    added, own = 0.0, 0.0
    for seed in range(4):
        call = stores.call_of(store, G=4, seed=seed)
        true, quantized = stores.exact(dense, call)[0], stores.exact(store, call)[0]
        added += float((stores.native(store, call)[0] - quantized).square().mean())
        own += float((quantized - true).square().mean())
    assert 0 < (added / own) ** 0.5 < share


def test_instruction_sets_agree_on_integers(environment):
    environment("KVLOOM_CPU_MODE", "default")
    store = stores.filled("int4", G=4, n=1000)
    call = stores.call_of(store, G=4)
    found = []
    for isa in ISAS:
        environment("KVLOOM_ISA", isa)
        found.append(stores.native(store, call))
    for other in found[1:]:  # but for numbers of 15 bits that lie between two
        assert_close(other, [x.double() for x in found[0]], 2e-5)


def test_what_changed_is_told_again():
    """A cache that grows, is cropped, copied and loses rows attends as one that is told everything."""
    model = stores.model(4, 2, 64, torch.float32)
    cache = CompressedCache(model, "streaming_llm | int4", budget="200tok")
    ids = torch.randint(0, 32, (2, 400), generator=torch.Generator().manual_seed(1))
    model(ids[:, :300], past_key_values=cache)
    for i in range(300, 400):
        model(ids[:, i : i + 1], past_key_values=cache)
        if i == 320:
            cache.reorder_cache(torch.tensor([1, 0]))
        store = cache.layers[0].store
        call = stores.call_of(store)
        known = store.native.attend(store, call)
        assert_close(stores.native(store, call), [x.double() for x in known], 1e-7)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("KVLOOM_ISA", "sse9", "KVLOOM_ISA='sse9' cannot run here"),
        ("KVLOOM_CPU_MODE", "quick", "KVLOOM_CPU_MODE='quick' is unknown"),
    ],
)
def test_unknown_choices_are_refused(environment, name, value, rule):
    environment(name, value)
    with pytest.raises(ValueError, match=rule):
        stores.native(store := stores.filled("int4"), stores.call_of(store))


def test_a_forced_backend_says_why_it_cannot(environment):
    environment("KVLOOM_BACKEND", "cpu")
    store = stores.filled("int4")
    call = stores.call_of(store, Q=40)
    assert "matrix products" in why_not(store, call)
    partials(store, call, None)  # long queries are torch's under every force
    call = replace(stores.call_of(store), past_mask=torch.ones(1, 1, 1, 300, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"KVLOOM_BACKEND=cpu cannot serve.*a mask addresses"):
        partials(store, call, None)


def test_addresses_are_checked():
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"contiguous CPU tensor of torch.float16.*float32"):
        cpu_backend.address(x, torch.float16)
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        cpu_backend.address(x.T)
    with pytest.raises(ValueError, match=r"cannot read torch\.float64"):
        cpu_backend.dense(x.double()[None, None])


def test_without_the_module_one_warning_and_torch():
    code = (
        "import sys, warnings; sys.modules['kvloom.kernels._cpu'] = None\n"
        "warnings.simplefilter('always')\n"
        "from kvloom.kernels import ops\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    reasons = {ops.cpu_refusal() for _ in range(3)}\n"
        "print(len(found), reasons, ops.serving())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1 {'kvloom was built without its CPU kernels'} torch"


@pytest.mark.parametrize("recipe", [*UNIFORM, *OTHERS])
@pytest.mark.parametrize("evict", ["", "knorm | ada | "])
def test_long_queries_read_a_decoded_workspace(recipe, evict):
    text = evict + ("dense(unpaged=0)" if recipe == "none" and evict else recipe)
    store = stores.filled(text, B=2, n=400, budget="300tok" if evict else None)
    call = stores.call_of(store, Q=40)
    assert why_not(store, call)
    got = ops.combine(partials(store, call, None))
    assert_close(got, stores.exact(store, call), 5e-6)


def test_the_operator_is_visible_to_compilers():
    store = stores.filled("int4")
    call = stores.call_of(store)
    want = stores.native(store, call)
    layer = library.name(store.native.handle)
    arguments = (call.query, layer, store.plan.value_dim)
    torch.library.opcheck(library.paged_attention, arguments)
    held = store.tail.keys, store.tail.values  # whose addresses the last call gave
    compiled = torch.compile(
        lambda q: torch.ops.kvloom.paged_attention(q * 1.0, layer, 64),
        backend="eager",
        fullgraph=True,
    )
    for got, w in zip(compiled(call.query), want, strict=True):
        assert torch.equal(got, w)
    assert all(len(x) for x in held)


def test_the_operator_knows_when_a_layer_is_gone():
    with pytest.raises(ValueError, match=r"layer 77 is not, or no longer"):
        torch.ops.kvloom.paged_attention(torch.zeros(1, 1, 1, 1, 8), 77, 8)


def test_what_was_freed_is_not_kept_alive_by_addresses():
    store = stores.filled("int4", n=400)
    stores.native(store, stores.call_of(store))
    freed = [weakref.ref(x) for slab in store.pool.slabs for x in slab.codes()]
    store.pool.slabs = []
    gc.collect()
    assert freed and not any(ref() is not None for ref in freed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["default", "fast"])
@pytest.mark.parametrize("D", [36, 80])
@pytest.mark.parametrize("recipe", ["int8", "int4(channels=32)", "int3(keys='channel')", "int2"])
def test_integer_products_of_odd_widths(environment, recipe, D, mode, isa):
    environment("KVLOOM_ISA", isa)
    environment("KVLOOM_CPU_MODE", mode)
    store = stores.filled(recipe, D=D, G=7, n=200)
    call = stores.call_of(store, G=7)
    tolerance = 1e-3 if mode == "default" and isa != "vnni" else 5e-2
    assert_close(stores.native(store, call), stores.exact(store, call), tolerance)


def test_masses_of_rejected_drafts_are_left_out(environment):
    masses = []
    for backend in ("torch", "cpu"):
        environment("KVLOOM_BACKEND", backend)
        store = stores.filled("h2o | dense(unpaged=0)", B=2, n=300, budget="280tok")
        call = stores.call_of(store, Q=5)
        keys, values = stores.entries(2, 2, 5, 64, seed=3)
        positions = torch.arange(300, 305).expand(2, -1)
        _, forward = store.forward(keys, values, call, None, positions)
        store.commit(forward, drop=2)
        (name,) = store.plan.recipe.scorer.state_names
        masses.append(torch.cat([slab.meta[name].flatten() for slab in store.pool.slabs]))
    assert_close(masses[1:], [masses[0].double()])


def test_logits_of_a_forward_that_was_given_up_are_forgotten():
    store = stores.filled("h2o | dense(unpaged=0)", n=300, budget="280tok")
    partials(store, stores.call_of(store, Q=3), None)
    assert store.native.raw is not None
    partials(store, stores.call_of(store, Q=40), None)
    assert store.native.raw is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_process_changes_nothing(dtype):
    store = stores.filled("h2o | int4", n=300, budget="280tok")
    call = stores.call_of(store)
    want = stores.native(store, call)
    torch.set_default_dtype(dtype)
    try:
        got = stores.native(store, call)
        read = store.native.read_all(store)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert read[0].dtype == torch.float32


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["none", "int4", "fp8"])
def test_what_is_not_finite_stays_visible(recipe, bad, where):
    store = stores.filled(recipe, n=100)
    call = stores.call_of(store)
    if where == "query":
        call.query[0, 0, 0, 0, 3] = bad
    else:
        store.tail.keys[0, 0, 2, 3] = bad
    out, _ = stores.native(store, call)
    assert out[0, 0, 0].isnan().any()
    assert torch.isfinite(out[0, 1]).all()


def test_a_workspace_of_fp16_saturates():
    store = stores.filled("int8(keys='channel')", dtype=torch.float16, n=64)
    keys = torch.full((1, 2, 64, 64), 65504.0, dtype=torch.float16)
    keys[:, :, ::2] *= -1
    positions = torch.arange(64, 128)[None]
    call = stores.call_of(store)
    store.commit(store.stage(keys, keys, call, None, positions))
    assert all(torch.isfinite(x).all() for x in store.native.read_all(store))


def test_the_operator_refuses_queries_of_another_layer():
    store = stores.filled("int4")
    stores.native(store, stores.call_of(store))
    layer = library.name(store.native.handle)
    with pytest.raises(ValueError, match=r"do not fit a layer of .* = \(1, 2, 2, 64, 64\)"):
        torch.ops.kvloom.paged_attention(torch.zeros(1, 1, 1, 1, 8), layer, 8)


def test_a_module_of_another_version_is_not_used():
    code = (
        "import types, sys, warnings; sys.modules['kvloom.kernels._cpu'] = types.ModuleType('_cpu')\n"
        "sys.modules['kvloom.kernels._cpu'].INTERFACE = 0\n"
        "warnings.simplefilter('ignore')\n"
        "from kvloom.kernels import ops; print(ops.serving())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "torch"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("recipe", ["int8", "int4(keys='channel')", "int2", "kivi(residual=0)"])
@pytest.mark.parametrize("ahead", [40.0, 80.0, 86.0, 200.0])
def test_one_loud_entry_leaves_tiles_with_next_to_no_weight(environment, recipe, ahead, isa):
    """Weights of other tiles go down to where fp32 ends; a reciprocal of them would be infinite."""
    environment("KVLOOM_CPU_MODE", "default")
    environment("KVLOOM_ISA", isa)
    store = stores.filled(recipe, n=320)
    keys = torch.full((1, 2, 320, 64), 1e-3)
    keys[:, :, 5] = 1.0
    positions = torch.arange(320)[None]
    call = stores.call_of(store)
    store.pool.slabs, store.tail = [], store.tail.empty()
    store.pool.recount()
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    store.commit(store.stage(keys, values, call, None, positions))
    call.query = torch.full_like(call.query, ahead / 64)
    call.scale = 1.0
    got, want = stores.native(store, call), stores.exact(store, call)
    assert torch.isfinite(got[0]).all()
    assert_close(got[:1], want[:1], 1e-4)

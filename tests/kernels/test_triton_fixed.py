"""Decoding in fixed memory: steps wait for nothing, and a replay of one step is the next one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from kvloom import CompressedCache
from kvloom.core import fixed
from kvloom.core.attend import Call, attend
from kvloom.core.fixed import FixedLayer
from kvloom.hf.fixed import FixedCache
from kvloom.kernels import ops, triton_backend
from tests.kernels import stores
from tests.kernels.test_cpu import assert_close
from tests.kernels.test_triton import _forced, filled  # noqa: F401

RECIPES = [
    "none", "int4(hadamard='both')", "knorm | int4",
    "streaming_llm(sinks=4) | int4", "streaming_llm(sinks=3, positions='original') | lazy(every=20)",
]  # fmt: skip

START = 190  # a page is full two tokens later


def token(seed, D=32, G=2):
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, 2, 1, D, generator=generator) for _ in range(2))
    return torch.randn(1, 2, G, 1, D, generator=generator), key, value


def started(recipe, n=START, steps=12):
    budget = "100tok" if "llm" in recipe or "knorm" in recipe else None
    store = filled(recipe, D=32, n=n, budget=budget)
    return FixedLayer(store, steps, 32**-0.5, slabs=3)


class NoWaiting(TorchDispatchMode):
    """Raises on what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{func} waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_and_flushes_attend_as_a_store_does(monkeypatch, recipe):
    """The store that gets the same tokens one flush at a time is the reference."""
    layer, other = started(recipe), started(recipe).store
    n = 0
    for steps in (1, 2, 1):
        for i in range(steps):
            query, key, value = token(n + i)
            if i in (0, steps - 1):
                want = reference(monkeypatch, other, n, i, query)
                got = layer.step(query, key, value)
                assert_close([got], [want.double()], 2e-5)
            else:
                layer.step(query, key, value)
        positions = torch.arange(START + n, START + n + steps)[None]
        layer.flush(positions)
        commit(other, n, steps, positions)
        n += steps
    assert layer.store.tail.count.equal(other.tail.count)


def commit(store, n, steps, positions):
    tokens = [token(n + i) for i in range(steps)]
    keys, values = (torch.cat([t[j] for t in tokens], 2) for j in (1, 2))
    call = Call(keys.new_zeros(1, 2, 1, steps, 32), 32**-0.5, positions=positions)
    store.commit(store.stage(keys, values, call, None, positions))


def reference(monkeypatch, store, n, i, query):
    """Attention of token n + i over the store and the tokens n .. n + i, in torch."""
    new = [token(n + j) for j in range(i + 1)]
    keys, values = (torch.cat([t[j] for t in new], 2) for j in (1, 2))
    queries = torch.cat([torch.zeros_like(query).expand(-1, -1, -1, i, -1), query], 3)
    positions = torch.arange(START + n, START + 1 + n + i)[None]
    call = Call(queries, 32**-0.5, positions=positions)
    with monkeypatch.context() as patch:
        patch.setenv("KVLOOM_BACKEND", "reference")
        ops.forced_backend.cache_clear()
        forward = store.stage(keys, values, call, None, positions)
        if store.plan.in_cache:
            store.next_position = positions[:, 0].to(torch.int64)
        out = attend(store, call, forward.block)[0][:, :, :, -1:]
    ops.forced_backend.cache_clear()
    return out


@pytest.mark.parametrize("recipe", ["int4", "streaming_llm(sinks=3, positions='original') | int4"])
def test_a_replayed_step_is_the_next_one(recipe):
    """As in a CUDA graph: the same launches on the same addresses, with other contents, also after pages
    were added in between.
    """
    layer, plain = started(recipe), started(recipe)
    query, key, value = (torch.empty_like(x) for x in token(0))

    def fill(seed):
        for x, new in zip((query, key, value), token(seed), strict=True):
            x.copy_(new)

    fill(0)
    graph, out = captured(layer, query, key, value)
    assert_close([out], [plain.step(*token(0)).double()], 1e-6)
    for n in range(1, 5):
        if n == 3:
            for each in (layer, plain):
                each.flush(torch.arange(START, START + 3)[None])
        fill(n)
        for launch, arguments in graph:
            launch(*arguments)
        want = plain.step(*token(n))
        if n > 1:
            assert_close([out], [want.double()], 1e-6)


def captured(layer, query, key, value):
    """One step, and its launches: what a graph holds."""
    held, kernels = [], triton_backend.kernels

    class Watched:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            found = getattr(self.module, name)
            return Kernel(found) if hasattr(found, "run") else found

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                def again():
                    self.kernel[grid](*args, **kwargs)

                held.append((again, ()))
                again()

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "kernels", lambda name: Watched(kernels(name)))
        out = layer.step(query, key, value)
    return held, out


@pytest.mark.parametrize("recipe", ["int4", "streaming_llm(sinks=4) | int4"])
def test_a_step_waits_for_nothing(recipe):
    layer = started(recipe)
    with NoWaiting():
        layer.step(*token(0))


def test_a_flush_makes_room_where_the_graph_reads():
    layer = started("int4", n=70, steps=3)
    slots = layer.slots
    for i in range(3):
        layer.step(*token(i))
    layer.flush(torch.arange(70, 73)[None])
    assert layer.slots == slots
    assert int(layer.count.max()) == int(layer.store.tail.longest)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [("h2o | int4", "watches"), ("snapkv | int4", "watches"), ("mp_kvm | int4", "centroids")],
)
def test_what_a_step_cannot_do_is_refused(recipe, reason):
    store = filled(recipe, D=32, n=300, budget="200tok")
    with pytest.raises(ValueError, match=f"cannot decode in fixed memory: .*{reason}"):
        FixedLayer(store, 8, 1.0)


def test_the_operator_is_visible_to_compilers():
    layer, plain = started("int4"), started("int4")
    query, key, value = token(3)
    compiled = torch.compile(
        lambda q, k, v, a, b, c: torch.ops.kvloom.fixed_step(q * 1.0, k, v, a, b, c, id(layer)),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    out = compiled(query, key, value, layer.keys, layer.values, layer.count)
    assert_close([out], [plain.step(query, key, value).double()], 1e-6)
    assert layer.count.equal(plain.count)
    with pytest.raises(ValueError, match="layer 77 is not, or no longer"):
        torch.ops.kvloom.fixed_step(query, key, value, layer.keys, layer.values, layer.count, 77)
    assert fixed.why_not(layer.store) is None


def test_a_model_decodes_in_fixed_memory(monkeypatch):
    """Logits are those of the cache that it was made from, before and after a flush."""
    model = stores.model(4, 2, 32, torch.float32)
    ids = torch.randint(0, 32, (2, 80), generator=torch.Generator().manual_seed(1))
    caches = [CompressedCache(model, "int8") for _ in range(2)]
    monkeypatch.delenv("KVLOOM_BACKEND")
    ops.forced_backend.cache_clear()
    for cache in caches:
        model(ids[:, :70], past_key_values=cache)
    want = [model(ids[:, i : i + 1], past_key_values=caches[1]).logits for i in range(70, 73)]
    monkeypatch.setenv("KVLOOM_BACKEND", "triton")
    ops.forced_backend.cache_clear()
    decoding = FixedCache(caches[0], steps=4)
    for i in range(70, 73):
        if i == 72:
            decoding.flush(2)
        place = torch.full((2, 1), i)
        got = model(ids[:, i : i + 1], past_key_values=decoding, position_ids=place).logits
        assert_close([got], [want[i - 70].double()], 1e-4)
    assert decoding.get_seq_length() == 72
    assert decoding.nbytes > caches[0].nbytes
    with pytest.raises(ValueError, match="takes one token"):
        model(ids[:, :2], past_key_values=decoding, position_ids=torch.arange(2).expand(2, -1))
    with pytest.raises(ValueError, match="prefilled"):
        FixedCache(CompressedCache(model, "int8"))

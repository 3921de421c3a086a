"""Decoding in fixed memory: steps wait for nothing, and a replay of one step is the next one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from kvloom import CompressedCache
from kvloom.core import fixed, fixed_window
from kvloom.core.attend import Call
from kvloom.core.fixed import FixedLayer
from kvloom.core.fixed_window import FixedWindow
from kvloom.core.view import entries_of
from kvloom.hf.fixed import FixedCache
from kvloom.kernels import ops, reference, triton_backend
from tests import models
from tests.kernels import stores
from tests.kernels.test_cpu import assert_close
from tests.kernels.test_triton import _forced, filled  # noqa: F401

SCALE, CAP = 0.2, 30.0
RECIPES = {  # and its budget
    "none": None,
    "int4(hadamard='both')": None,
    "knorm | ada | int4": "100tok",
    "streaming_llm(sinks=4) | int4": "100tok",
    "streaming_llm(sinks=3, positions='original') | lazy(every=20)": "100tok",
    "h2o(sinks=2) | int8": "100tok",
    "snapkv(window=3) | int4": "100tok",
    "knorm | mass_fold(weight='count') | int8": "100tok",
    "mp_kvm(max_centroids=6) | int8": "100tok",
    "mp_kvm(max_centroids=6, positions='slot')": "100tok",
    "mp_kvm(max_centroids=6, positions='positionless')": "100tok",
}

START = 190  # a page is full two tokens later


def heads_of(recipe):
    return 2 if "ada" in recipe else 1


def token(seed, H=1, D=32, G=2):
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(1, H, 1, D, generator=generator) for _ in range(2))
    return torch.randn(1, H, G, 1, D, generator=generator), key, value


def started(recipe, n=START, steps=4):
    store = filled(recipe, H=heads_of(recipe), D=32, n=n, budget=RECIPES.get(recipe))
    return FixedLayer(store, steps, slabs=3)


def step(layer, seed, sink_logits=None):
    query, key, value = token(seed, layer.store.plan.heads)
    call = Call(query, SCALE, CAP, sink_logits, positions=torch.tensor([[seed]]))
    return layer.step(call, key, value)


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
    """Of which each flush is one forward: what policies see of queries and attention is the same, too."""
    layer, other, at = started(recipe), started(recipe).store, START
    heads = heads_of(recipe)
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.0]])[:heads]
    for n in (1, 2, 1):
        got = torch.cat([step(layer, at + i, logits) for i in range(n)], 3)
        positions = torch.arange(at, at + n)[None]
        layer.flush(positions)
        new = [
            torch.cat(x, -2) for x in zip(*(token(at + i, heads) for i in range(n)), strict=True)
        ]
        monkeypatch.setenv("KVLOOM_BACKEND", "reference")
        ops.forced_backend.cache_clear()
        call = Call(new[0], SCALE, CAP, logits, positions=positions)
        want, forward = other.forward(new[1], new[2], call, None, positions)
        other.commit(forward)
        monkeypatch.setenv("KVLOOM_BACKEND", "triton")
        ops.forced_backend.cache_clear()
        assert_close([got], [want.double()], 2e-5)
        at += n
    held = [
        (x.tail.count.tolist(), x.pool.live.tolist(), entries_of(x)) for x in (layer.store, other)
    ]
    assert held[0][:2] == held[1][:2]
    assert_close([held[0][2].keys], [held[1][2].keys.double()], 1e-6)


@pytest.mark.parametrize("recipe", ["streaming_llm(sinks=4) | int4", "h2o(sinks=2) | int8"])
def test_a_replayed_step_is_the_next_one(recipe):
    """As in a CUDA graph: the same operations on the same addresses, with other contents, also after
    rehearsals were forgotten, and after pages were added in between.
    """
    layer, plain = started(recipe), started(recipe)
    call = Call(token(0)[0], SCALE, CAP, positions=torch.tensor([[0]]))
    _, key, value = token(0)
    out, graph = captured(layer, call, key, value)
    layer.flush(torch.empty(1, 0, dtype=torch.int64))
    for n in range(START, START + 3):
        if n == START + 2:
            for each in (layer, plain):
                each.flush(torch.arange(START, n)[None])
        for x, new in zip((call.query, key, value), token(n), strict=True):
            x.copy_(new)
        graph()
        assert_close([out], [step(plain, n).double()], 1e-6)
    assert layer.count.equal(plain.count)


def captured(layer, call, key, value):
    """One step's result, and what repeats the step as a graph does: launches of kernels and operators of
    torch, with the tensors that they had, whose results are copied to where they were.
    """
    held, kernels = [], triton_backend.kernels

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if not func.is_view:
                held.append((func, args, kwargs or {}, found))
            return found

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
                with _disable_current_modes():  # the interpreter is no part of the graph
                    self.kernel[grid](*args, **kwargs)
                held.append((self.kernel[grid], args, kwargs, None))

            return launch

    def again():
        for run, args, kwargs, found in held:
            made = run(*args, **kwargs)
            if isinstance(found, torch.Tensor) and made is not found:
                found.copy_(made)

    with pytest.MonkeyPatch.context() as patch, Recorder():
        patch.setattr(triton_backend, "kernels", lambda name: Watched(kernels(name)))
        out = layer.step(call, key, value)
    return out, again


@pytest.mark.parametrize(
    "recipe",
    [
        "streaming_llm(sinks=4) | int4",
        "h2o(sinks=2) | int8",
        "mp_kvm(max_centroids=6, positions='positionless')",
    ],
)
def test_a_step_waits_for_nothing(recipe):
    layer = started(recipe)
    with NoWaiting():
        step(layer, 0)


def test_a_flush_makes_room_where_the_graph_reads():
    layer = started("int4", n=70, steps=3)
    slots = layer.slots
    for i in range(3):
        step(layer, i)
    layer.flush(torch.arange(70, 73)[None])
    assert layer.slots == slots
    assert int(layer.count.max()) == int(layer.store.tail.longest)


@pytest.mark.parametrize(
    ("n", "recipe", "reason"),
    [(40, "int4", "no pages yet"), (2, "streaming_llm(sinks=4) | int4", "sinks are not full")],
)
def test_what_cannot_start_is_refused(n, recipe, reason):
    store = filled(recipe, D=32, n=n, budget=RECIPES.get(recipe))
    with pytest.raises(ValueError, match=f"cannot decode in fixed memory: .*{reason}"):
        FixedLayer(store, 8)


def test_the_operator_is_visible_to_compilers():
    layer, plain = started("h2o(sinks=2) | int8"), started("h2o(sinks=2) | int8")
    query, key, value = token(3)
    logits, at = torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64)
    rest = at, logits, layer.written(), SCALE, CAP, layer.number
    torch.library.opcheck(fixed.fixed_step, (query, key, value, *rest))
    layer.flush(torch.empty(1, 0, dtype=torch.int64))
    compiled = torch.compile(
        lambda q: torch.ops.kvloom.fixed_step(q * 1.0, key, value, *rest) + 0.0,
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    out = compiled(query)
    call = Call(query, SCALE, CAP, logits)
    assert_close([out], [plain.step(call, key, value).double()], 1e-6)
    for got, want in zip(layer.written(), plain.written(), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="layer 77 is not, or no longer"):
        torch.ops.kvloom.fixed_step(query, key, value, *rest[:-1], 77)


def test_a_model_decodes_in_fixed_memory(monkeypatch):
    """Logits are those of the cache that it was made from, before and after a flush."""
    model = stores.model(2, 1, 32, torch.float32)
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
    compiled = torch.compile(
        lambda i, at: model(i, past_key_values=decoding, position_ids=at).logits, backend="eager"
    )
    got = compiled(ids[:, 73:74], torch.full((2, 1), 73))
    assert_close([got], [model(ids[:, 73:74], past_key_values=caches[1]).logits.double()], 1e-4)
    with pytest.raises(ValueError, match="takes one token"):
        model(ids[:, :2], past_key_values=decoding, position_ids=torch.arange(2).expand(2, -1))
    with pytest.raises(ValueError, match="prefilled"):
        FixedCache(CompressedCache(model, "int8"))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_sliding_windows_softcaps_and_sink_logits_in_fixed_memory(monkeypatch, family):
    """Windows of 8 tokens, that of gemma2 with a softcap, that of gpt_oss with sink logits."""
    model, ids = models.build(family), models.tokens(78)
    monkeypatch.setenv("KVLOOM_BACKEND", "reference")
    ops.forced_backend.cache_clear()
    caches = [CompressedCache(model, "int8") for _ in range(2)]
    for cache in caches:
        model(ids[:, :70], past_key_values=cache)
    want = [model(ids[:, i : i + 1], past_key_values=caches[1]).logits for i in range(70, 73)]
    monkeypatch.setenv("KVLOOM_BACKEND", "triton")
    ops.forced_backend.cache_clear()
    decoding = FixedCache(caches[0], steps=4)
    for i in range(70, 73):
        place = torch.tensor([[i]])
        if i == 72:
            decoding.flush(2)
            model(ids[:, :1], past_key_values=decoding, position_ids=place)  # a rehearsal
            decoding.flush(0)
        got = model(ids[:, i : i + 1], past_key_values=decoding, position_ids=place).logits
        assert_close([got], [want[i - 70].double()], 1e-4)
    decoding.flush(1)
    for mine, other in zip(*(cache.layers for cache in caches), strict=True):
        if mine.is_sliding:
            assert mine.cumulative_length == other.cumulative_length == 73
            assert_close([mine.keys], [other.keys.double()], 1e-4)


def test_a_window_is_visible_to_compilers():
    """More tokens than it has slots; those that left are not seen."""
    query, key, value = token(1)
    keys, values = stores.entries(1, 1, 9, 32)
    window = FixedWindow(keys, values, 6)
    window.refresh(keys, values, 9)
    arguments = query, key, value, torch.zeros(1, 2), *window.tensors(), SCALE, CAP
    torch.library.opcheck(fixed_window.fixed_window_step, arguments)
    window.refresh(keys, values, 9)
    got = window.step(Call(query, SCALE, CAP, torch.zeros(1, 2)), key, value)
    held = [torch.cat([x[:, :, -5:], new], 2) for x, new in ((keys, key), (values, value))]
    want = reference.partial_attention(query, *held, scale=SCALE, softcap=CAP)
    assert_close([got], [reference.combine([want], torch.zeros(1, 2))[0].double()], 1e-5)
    assert window.newest(8, 2)[0].equal(held[0][:, :, -2:])

"""Layers filled with random entries, and attention over them in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvloom import CompressedCache
from kvloom.core.attend import Call
from kvloom.core.format import PAGE
from kvloom.core.native import Native
from kvloom.core.store import LayerStore


@cache
def model(heads: int, kv: int, width: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8 * heads, intermediate_size=32, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=width, vocab_size=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def entries(B: int, H: int, n: int, D: int, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    """Random keys with loud channels and a bias, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, H, n, D, generator=generator) for _ in range(2))
    loud = torch.ones(D)
    loud[::7] = 4
    return ((keys + 0.3) * loud).to(dtype), values.to(dtype)


def filled(
    recipe: str,
    B=1,
    H=2,
    G=2,
    D=64,
    n=300,
    dtype=torch.float32,
    chunk=128,
    budget=None,
    seed=0,
    rope=None,
) -> LayerStore:
    """The store of a layer that has seen n tokens in chunks, by another rotation than Llama's if given."""
    layer = CompressedCache(model(H * G, H, D, dtype), recipe, budget=budget).layers[0]
    keys, values = entries(B, H, n, D, dtype, seed)
    layer.lazy_initialization(keys[:, :, :1], values[:, :, :1])
    store = layer.store
    if rope is not None:
        store = LayerStore(replace(store.plan, rope=rope), keys, values)
    for i in range(0, n, chunk):
        k, v = keys[:, :, i : i + chunk], values[:, :, i : i + chunk]
        positions = torch.arange(i, i + k.shape[2]).expand(B, -1)
        query = torch.randn(
            B, H, G, k.shape[2], D, generator=torch.Generator().manual_seed(i), dtype=torch.float32
        )
        call = Call(query.to(dtype), D**-0.5, positions=positions)
        _, forward = store.forward(k, v, call, None, positions)
        store.commit(forward)
    return store


def call_of(store: LayerStore, G=2, Q=1, seed=5, scale=None, **options) -> Call:
    plan, B = store.plan, len(store.seen)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, plan.heads, G, Q, plan.key_dim, generator=generator)
    positions = torch.full((B, Q), 10_000)
    scale = plan.key_dim**-0.5 if scale is None else scale
    return Call(query.to(plan.dtype), scale, positions=positions, **options)


def native(store: LayerStore, call: Call) -> tuple[Tensor, Tensor]:
    """The kernels' partial result over pages, tail and sinks, told anew."""
    store.native = Native()
    return store.native.attend(store, call)


def exact(
    store: LayerStore, call: Call, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The same in float64 over decoded entries; in fp32, what plain products and sums make of it."""
    plan = store.plan
    keys, values, bias = [], [], []
    for slab in store.pool.slabs:
        k, v = (x.to(dtype) for x in decoded(store, slab))
        alive = slab.valid()
        mass = slab.meta["mass"][:, :, : slab.pages * PAGE] if "mass" in slab.meta else 0.0
        keys.append(k)
        values.append(v)
        bias.append((torch.zeros(alive.shape) + mass).masked_fill(~alive, -torch.inf))
    for block in [store.tail] if store.sinks is None else [store.tail, store.sinks]:
        n = block.longest
        own = block.keys[:, :, :n].to(dtype)
        if block is store.sinks and plan.in_cache:  # the same as turning queries back
            own = rotated(plan.rope, own, store.sink_gap()[..., None].expand(own.shape[:3]), 1.0)
        keys.append(own)
        values.append(block.values[:, :, :n].to(dtype))
        mass = block.meta["mass"][:, :, :n] if "mass" in block.meta else 0.0
        bias.append(
            (torch.zeros(block.valid(n).shape) + mass).masked_fill(~block.valid(n), -torch.inf)
        )
    k, v, b = (torch.cat(x, 2).to(dtype) for x in (keys, values, bias))
    logits = torch.einsum("bhgqd,bhsd->bhgqs", call.query.to(dtype), k) * call.scale
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits + b[:, :, None, None]
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0.0)
    assert v.shape[-1] == plan.value_dim
    return torch.einsum("bhgqs,bhse->bhgqe", weights, v), lse


def decoded(store: LayerStore, slab) -> tuple[Tensor, Tensor]:
    """Keys as attention uses them, and values, of a slab: fp32 `[B, H, S, W]`."""
    B, H = slab.first.shape
    n = slab.pages * PAGE
    keys, values = (
        torch.zeros(B, H, n, store.plan.key_dim),
        torch.zeros(B, H, n, store.plan.value_dim),
    )
    for segment in slab.segments():
        k, v = store.pool.format.decode(store.pool.stored(segment, slab), torch.float32)
        keys[segment.rows, segment.heads, : k.shape[2]] = k.float()
        values[segment.rows, segment.heads, : v.shape[2]] = v.float()
    if store.plan.pre_rope:
        keys = rotated(store.plan.rope, keys.double(), slab.positions())
    return keys, values


def rotated(rope, keys: Tensor, positions: Tensor, gain: float | None = None) -> Tensor:
    """`RopeSpec.rotate` with angles that are not rounded."""
    gain = rope.scale if gain is None else gain
    angle = positions.double()[..., None] * rope.inv_freq.double()
    turn = torch.polar(torch.full_like(angle, gain), angle)
    part, rest = keys[..., : rope.n_rot], keys[..., rope.n_rot :]
    shape, last = ((2, -1), -2) if rope.pairing == "half" else ((-1, 2), -1)
    pairs = torch.complex(*part.unflatten(-1, shape).unbind(last)) * turn
    return torch.cat([torch.stack([pairs.real, pairs.imag], last).flatten(-2), rest], -1)

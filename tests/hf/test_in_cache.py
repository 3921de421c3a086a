"""In-cache positions equal a from-scratch reference with re-computed RoPE.

The reference keeps pre-RoPE keys (the model's rotation is patched to the identity) and rotates
queries and keys at their slot index, as the StreamingLLM paper describes.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import eager_mask

from kvloom import CompressedCache
from kvloom.hf.rope import attention_modules, rope_of
from tests.contract.modes import chunked, padded, padded_chunked, single
from tests.models import build

SINKS, RECENT = 3, 80
MODES = {f.__name__: f for f in (single, padded, chunked, padded_chunked)}
FAMILIES = [
    "llama",
    "llama3_rope",
    "qwen3",
    "gpt_neox",
    "gpt_neox_80",
    "mistral",
    "phi3",
    "cohere",
    "glm",
]


class SlotLayer(CacheLayerMixin):
    """Per row, plain lists of the kept tokens' pre-RoPE keys and values."""

    is_sliding = False

    def __init__(self, cache):
        super().__init__()
        self.cache, self.columns, self.kept = cache, 0, None

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        if self.kept is None:
            self.kept = [[] for _ in range(key_states.shape[0])]
        self.columns += key_states.shape[2]
        keys = key_states.view_as(key_states)
        keys.layer = self
        return keys, value_states

    def get_seq_length(self):
        return self.columns

    def get_mask_sizes(self, query_length):
        return query_length, self.columns

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    def __init__(self, model, rope, packed):
        self.rope, self.packed = rope, packed
        super().__init__(layers=[SlotLayer(self) for _ in range(model.config.num_hidden_layers)])


def slot_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    layer, rope = key.layer, key.layer.cache.rope
    B, heads, Q, _ = query.shape
    group = heads // key.shape[1]
    valid = torch.ones(B, Q, dtype=torch.bool)
    if attention_mask is not None:
        valid = (attention_mask[:, 0].diagonal(dim1=-2, dim2=-1) > -1).expand(B, Q)
    out = torch.zeros(B, Q, heads, value.shape[3])
    positions = kwargs["position_ids"].expand(B, Q)
    for b in range(B):
        past, first = layer.kept[b], len(layer.kept[b])
        new = [
            {"k": key[b, :, i], "v": value[b, :, i], "p": int(positions[b, i])}
            for i in range(Q) if valid[b, i]
        ]  # fmt: skip
        tokens = past + new
        if new:
            slots = torch.arange(len(tokens))
            keys = rope.rotate(torch.stack([t["k"] for t in tokens], 1), slots)
            values = torch.stack([t["v"] for t in tokens], 1)
            for n, i in enumerate(i for i in range(Q) if valid[b, i]):
                seen = first + n + 1
                q = rope.rotate(query[b, :, i : i + 1], torch.tensor([seen - 1]))
                logits = (q @ keys[:, :seen].repeat_interleave(group, 0).transpose(1, 2)) * scaling
                out[b, i] = (logits.softmax(-1) @ values[:, :seen].repeat_interleave(group, 0))[
                    :, 0
                ]
        layer.kept[b] = evict(pack(tokens, layer.cache, rope))
    return out, None


def per_token_int4(x):
    """`x [H, D]` on a grid of 16 values per head, with an fp16 scale and minimum, rounded down."""
    least = x.amin(-1, keepdim=True)
    near = least.half()
    below = torch.nextafter(near, torch.tensor(-math.inf).half())
    low = torch.where(near.float() > least, below, near).float()
    step = ((x.amax(-1, keepdim=True) - low) / 15).half().float()
    return ((x - low) / step).round().clamp(0, 15) * step + low


def evict(tokens):
    return tokens if len(tokens) <= SINKS + RECENT else tokens[:SINKS] + tokens[-RECENT:]


def pack(tokens, cache, rope):
    """Per-token INT4 of what kvloom would have sealed: full pages of 64 of the window's tokens."""
    if not cache.packed:
        return tokens
    window = evict(tokens)[SINKS:]
    fresh = [t for t in window if "sealed" not in t]
    for page in range(len(fresh) // 64):
        for t in fresh[page * 64 : page * 64 + 64]:
            at = torch.tensor([t["p"]])
            stored = rope.rotate(t["k"][:, None], at)
            read = [per_token_int4(x) for x in (stored[:, 0], t["v"])]
            t["k"], t["v"], t["sealed"] = rope.unrotate(read[0][:, None], at)[:, 0], read[1], True
    return tokens


AttentionInterface.register("slot_reference", slot_attention)
AttentionMaskInterface.register("slot_reference", eager_mask)


FORMATS = ["dense", "dense(unpaged=0)", "int4"]
CASES = [  # every family in every mode, in formats by turns; the rest is the full product's
    pytest.param(family, mode, fmt, marks=[pytest.mark.full] if (i + j + k) % 3 else [])
    for i, family in enumerate(FAMILIES)
    for j, mode in enumerate(MODES)
    for k, fmt in enumerate(FORMATS)
]


@pytest.mark.parametrize(("family", "mode", "fmt"), CASES)
def test_equals_recomputed_rope(family, mode, fmt, monkeypatch):
    ours, theirs = build(family), build(family, attention="slot_reference")
    recipe = f"streaming_llm(sinks={SINKS}, recent={RECENT}) | {fmt}"
    got = MODES[mode](ours, lambda: CompressedCache(ours, recipe))
    exact = MODES[mode](
        ours, lambda: CompressedCache(ours, recipe.replace("int4", "dense(unpaged=0)"))
    )

    rope = rope_of(theirs, 0)
    module = sys.modules[type(attention_modules(theirs)[0]).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *args, **kw: (q, k))
    want = MODES[mode](theirs, lambda: SlotCache(theirs, rope, fmt == "int4"))

    for (_, logits), (_, logits_want), (_, dense) in zip(got, want, exact, strict=True):
        same = (logits.argmax(-1) == logits_want.argmax(-1)).all(-1).tolist()
        n = len(same) if False not in same else same.index(False) + 1
        assert n == len(same) or fmt == "int4"
        assert n >= 3
        limit = 1e-3 * logits_want.abs().max()
        if fmt == "int4":  # a code may round the other way: 5 % of what quantization changes
            limit = 0.05 * (dense[:n] - logits_want[:n]).abs().max()
        assert (logits[:n] - logits_want[:n]).abs().max() < limit


def test_original_positions_differ():
    """The reference discriminates: absolute positions give other logits."""
    model = build("llama")
    size = f"sinks={SINKS}, recent={RECENT}"
    runs = [
        single(model, lambda p=p: CompressedCache(model, f"streaming_llm({size}, positions='{p}')"))
        for p in ("in_cache", "original")
    ]
    difference = (
        (runs[0][0][1][0] - runs[1][0][1][0]).abs().max()
    )  # first step: nothing evicted yet
    later = (runs[0][0][1][2] - runs[1][0][1][2]).abs().max()
    assert difference < 1e-3 and later > 0.1

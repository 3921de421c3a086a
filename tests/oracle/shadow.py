"""The mask-only oracle: nothing is ever evicted, dead entries are masked, in naive Python loops.

It keeps every token of every layer, decides by brute force who lives, and fakes what a format does
by decoding what it encoded. It shares with kvloom only the methods under their own names
(`Scorer.arrive/observe/score`, `PageFormat.encode/decode`, `RopeSpec`), which have oracles of
their own; selection, schedule, sealing, tiles and masks are written again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import eager_mask

from kvloom.core.entries import Entries
from kvloom.core.format import PageBatch
from kvloom.core.recipe import Recipe
from kvloom.hf.rope import rope_of

NAME = "shadow_oracle"


class ShadowLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: ShadowCache, layer_idx: int):
        super().__init__()
        self.cache, self.layer_idx, self.columns = cache, layer_idx, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, H = key_states.shape[:2]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.real = torch.zeros(B, 0, dtype=torch.bool)
        self.positions = torch.zeros(B, 0, dtype=torch.long)
        self.alive = torch.zeros(B, H, 0, dtype=torch.bool)
        self.state: dict[str, Tensor] = {}
        self.unsealed = [[[] for _ in range(H)] for _ in range(B)]
        self.tile = [[{} for _ in range(H)] for _ in range(B)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *a: Any, **k: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], 2)
        self.values = torch.cat([self.values, value_states], 2)
        self.columns += key_states.shape[2]
        keys = self.keys.view_as(self.keys)
        keys.shadow = self
        return keys, self.values

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for name in ("keys", "values", "real", "positions", "alive"):
            setattr(self, name, getattr(self, name)[beam_idx])
        self.state = {n: x[beam_idx] for n, x in self.state.items()}
        rows = beam_idx.tolist()
        self.unsealed = [[list(h) for h in self.unsealed[i]] for i in rows]
        self.tile = [[dict(h) for h in self.tile[i]] for i in rows]

    # -- the brute force -------------------------------------------------------------------------

    def take_in(self, new: int, real: Tensor, positions: Tensor, weights: Tensor) -> None:
        """`real` [B, new], `positions` [B, new], `weights` [B, H, G, new, T]."""
        recipe, B = self.cache.recipe, real.shape[0]
        H, T = self.keys.shape[1], self.keys.shape[2]
        self.real = torch.cat([self.real, real], 1)
        self.positions = torch.cat([self.positions, positions], 1)
        self.alive = torch.cat([self.alive, real[:, None].expand(B, H, new)], 2)
        if recipe.scorer is not None:
            arrived = recipe.scorer.arrive(self.keys[:, :, T - new :], self.values[:, :, T - new :])
            for name, x in arrived.items():
                old = self.state.get(name, x[:, :, :0])
                self.state[name] = torch.cat([old, x], 2)
            mass = (weights * real[:, None, None, :, None]).sum((2, 3))
            self.state = recipe.scorer.observe(self.state, {"attention_mass": mass})
        for b, row in enumerate(self.real.tolist()):
            pinned = self.pinned(b)
            fresh = [j for j in range(T - new, T) if row[j] and j not in pinned]
            for h in range(H):
                self.unsealed[b][h] += fresh
        if recipe.evicts:
            self.evict()
        for b in range(B):
            for h in range(H):
                self.seal(b, h)

    def pinned(self, b: int) -> set[int]:
        sinks = self.cache.recipe.scorer.pinned if self.cache.recipe.scorer else 0
        return set(self.real[b].nonzero().flatten().tolist()[:sinks])

    def scores(self) -> Tensor:
        B, H, T = self.alive.shape
        valid = self.alive.clone()
        for b in range(B):
            for j in self.pinned(b):
                valid[b, :, j] = False
        meta = dict(self.state)
        meta["positions"] = self.positions[:, None].expand(B, H, T)
        stored = self.keys
        entries = Entries(valid, meta, lambda: stored, lambda: self.values)
        return self.cache.recipe.scorer.score(entries).float()

    def evict(self) -> None:
        recipe, scores, alive = self.cache.recipe, self.scores().tolist(), self.alive.tolist()
        B, H, T = self.alive.shape
        for b in range(B):
            pinned = self.pinned(b)
            for h in range(H):
                live = [j for j in range(T) if alive[b][h][j]]
                capacity = self.cache.capacity(self.layer_idx, h)
                goal = self.goal(len(live), capacity)
                if goal == len(live):
                    continue
                free = [j for j in live if j not in pinned]
                protected = int(recipe.scorer.protected(torch.tensor([[capacity - len(pinned)]])))
                keep = self.chosen(b, h, free, scores[b][h], goal - len(pinned), protected)
                self.alive[b, h, [j for j in free if j not in keep]] = False
                self.unsealed[b][h] = [j for j in self.unsealed[b][h] if j in keep]

    def goal(self, length: int, capacity: int) -> int:
        schedule = self.cache.recipe.schedule
        if schedule.every == 0 or length - capacity < schedule.every:
            return length
        drop = schedule.max_drop or 10**9
        return max(capacity, min(length - drop, capacity + schedule.slack))

    def chosen(
        self, b: int, h: int, free: list[int], scores: list[float], target: int, protected: int
    ) -> set[int]:
        """Sort everything by (score, newness); tiles by their mean; take the best `target`."""
        value = {j: scores[j] for j in free}
        for j in free[len(free) - min(protected, target) :] if min(protected, target) else []:
            value[j] = math.inf
        tiles: dict[int, list[int]] = {}
        if self.cache.format is not None and not self.cache.format.movable:
            for j in free:
                if j in self.tile[b][h]:
                    tiles.setdefault(self.tile[b][h][j], []).append(j)
        for members in tiles.values():
            mean = sum(value[j] for j in members) / len(members)
            for j in members:
                value[j] = mean
        ranked = sorted(free, key=lambda j: (-value[j], -j))
        keep = set(ranked[:target])
        for members in tiles.values():
            if not keep.issuperset(members):
                keep -= set(members)
        return keep

    def seal(self, b: int, h: int) -> None:
        fmt = self.cache.format
        if fmt is None:
            return
        waiting = self.unsealed[b][h]
        while len(waiting) >= 64 + fmt.residual:
            page, waiting = waiting[:64], waiting[64:]
            keys, values = self.keys[b, h, page], self.values[b, h, page]
            positions = self.positions[b, page]
            rope = self.cache.rope(self.layer_idx) if fmt.pre_rope else None
            stored = keys if rope is None else rope.unrotate(keys, positions).to(keys.dtype)
            none = torch.zeros(1, dtype=torch.long)
            encoded = fmt.encode(PageBatch(stored[None], values[None], none, none), {})
            sets = {n: x.expand(2, *x.shape[1:]) for n, x in encoded.scale_set.items()}
            slots = {n: x[0] for n, x in encoded.slot.items()}
            keys, values = fmt.decode(slots, sets, self.keys.dtype)
            if rope is not None:
                keys = rope.rotate(keys, positions).to(self.keys.dtype)
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.keys[b, h, page], self.values[b, h, page] = keys, values
            for i, j in enumerate(page):
                self.tile[b][h][j] = page[0] * 2 + i // 32
        self.unsealed[b][h] = waiting


class ShadowCache(Cache):
    """`capacity`: entries per head, for every layer and head, or a function of (layer, head)."""

    def __init__(self, model: Any, recipe: str, capacity: Any = None):
        self.recipe = Recipe.parse(recipe)
        self.format = self.recipe.format
        if isinstance(capacity, int) or capacity is None:
            size = (
                self.recipe.scorer.capacity if self.recipe.scorer and capacity is None else capacity
            )
            self.capacity = lambda layer, head: size
        else:
            self.capacity = capacity
        self.model = model
        kinds, kwargs = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
        super().__init__(
            layers=[
                ShadowLayer(self, i)
                if kind == "full_attention"
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**kw)
                for i, (kind, kw) in enumerate(zip(kinds, kwargs, strict=True))
            ]
        )

    def rope(self, layer_idx: int) -> Any:
        return rope_of(self.model, layer_idx)


def shadow_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    layer = getattr(key, "shadow", None)
    B, heads, Q, D = query.shape
    H, T = key.shape[1], key.shape[2]
    groups = heads // H
    scale = D**-0.5 if scaling is None else scaling
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is None:
        attention_mask = torch.zeros(1, 1, Q, T)
    hidden = attention_mask < -1
    if layer is not None:
        dead = torch.zeros(B, H, T, dtype=torch.bool)
        dead[:, :, : layer.alive.shape[2]] = ~layer.alive
        hidden = hidden | dead.repeat_interleave(groups, 1)[:, :, None]
    logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    if s_aux is not None:
        sink = s_aux.view(1, heads, 1, 1).expand(B, heads, Q, 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :T]
    else:
        weights = logits.softmax(-1)
    out = weights @ value.repeat_interleave(groups, 1)
    if layer is not None:
        new = attention_mask[:, 0, :, T - Q :].diagonal(dim1=-2, dim2=-1) > -1
        real = new.expand(B, Q)
        layer.take_in(
            Q, real, kwargs["position_ids"].expand(B, Q), weights.view(B, H, groups, Q, T)
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shadow_attention)
AttentionMaskInterface.register(NAME, eager_mask)

"""The attention and mask functions that kvloom registers with transformers under one name.

`CompressedLayer.update` returns handles instead of tensors; the attention function recognises them
and lets the layer attend over its tiers. Plain tensors (other caches, sliding layers, no cache) go
to SDPA, so the implementation can stay installed.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvloom.kernels import ops

if TYPE_CHECKING:
    from kvloom.hf.cache import CompressedCache
    from kvloom.hf.layer import CompressedLayer

NAME = "kvloom"
_LOCAL = threading.local()


class Handle:
    """What `update` returns in place of keys or values: a reference to the layer that holds them."""

    __slots__ = ("layer",)

    def __init__(self, layer: CompressedLayer):
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            f"this model's attention asks its cached keys or values for {name!r}, so it cannot read "
            "a compressed cache in place: construct the cache from this model (it may have been made "
            "for another one), if need be with attention='dense'"
        )


def announce(cache: CompressedCache) -> None:
    """Called by `get_mask_sizes`: the next mask to be built belongs to this cache."""
    _LOCAL.cache = weakref.ref(cache)


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Transformers' SDPA mask; on the way, the cache learns which new columns are padding."""
    announced = getattr(_LOCAL, "cache", None)
    cache = None if announced is None else announced()
    if cache is not None and kwargs.get("local_size") is None:
        _LOCAL.cache = None
        cache.context.learn(attention_mask, int(kv_offset), int(q_length), cache.valid_tokens())
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over handles by kvloom, over tensors by SDPA; `[B, Q, heads, E]`."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "generate_batch brings a paged cache of its own; a compressed cache works with generate()"
        )
    if isinstance(key, Handle):
        if kwargs.get("position_bias") is not None:
            raise NotImplementedError("attention with a position bias (T5) has no compressed form")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = key.layer.attend(
            module, query, attention_mask, scale, softcap, s_aux, kwargs.get("position_ids")
        )
        return out.transpose(1, 2).contiguous(), None
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if softcap is not None or s_aux is not None:
        return dense_attention(query, key, value, attention_mask, scaling, softcap, s_aux), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Tensor attention with softcap or sink logits, which SDPA lacks: `[B, Q, heads, E]`."""
    B, heads, Q, D = query.shape
    H, T = key.shape[1], key.shape[2]
    grouped = query.reshape(B, H, heads // H, Q, D)
    if mask is None:
        mask = ops.causal_mask(T, query.device)[..., T - Q :, :]
    elif mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    scale = D**-0.5 if scaling is None else scaling
    part = ops.partial_attention(
        grouped, key, value, scale=scale, softcap=softcap, mask=mask[..., :T]
    )
    sinks = None if s_aux is None else s_aux.reshape(H, heads // H)
    out, _ = ops.combine([part], sinks)
    return out.reshape(B, heads, Q, -1).transpose(1, 2).to(query.dtype).contiguous()


def install() -> None:
    """Register both functions (idempotent). Without the mask function padding would be lost."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)

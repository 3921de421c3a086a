"""Which models can read a compressed cache in place, and the reason for those that cannot."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from kvloom.hf.rope import attention_modules

# Attention classes that work on the keys or values after `update` (reshape, expand, normalise).
_TOUCH_KEYS = ("diffllama", "doge", "jetmoe", "moonshine", "idefics", "gpt2", "gpt_bigcode")


def handle_refusal(model: nn.Module, config: Any) -> str | None:
    """Why this model needs dense tensors from its cache, or None."""
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention expands the cached latents itself"
    if getattr(config, "num_kv_shared_layers", 0):
        return "later layers reuse the keys and values of earlier ones"
    if config.model_type in _TOUCH_KEYS:
        return f"the attention of {config.model_type!r} works on cached keys or values itself"
    modules = attention_modules(model)
    if not modules:
        return "no attention module with a layer index was found"
    for kind in {type(module) for module in modules.values()}:
        if "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(kind):
            return f"{kind.__name__} does not go through the attention interface"
    return None


def cache_refusal(config: Any) -> str | None:
    """Why this model cannot use a compressed cache at all, or None."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models keep two caches; only decoder-only models are supported"
    if getattr(config, "num_kv_shared_layers", 0):
        return (
            "layers that share keys and values read a cache entry after it was compressed "
            f"({config.num_kv_shared_layers} shared layers in {config.model_type!r})"
        )
    return None

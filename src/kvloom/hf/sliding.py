"""Sliding-window layers stay transformers' own; a budget in bytes still has to count them."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs


def layer_kinds(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Kind and constructor arguments of each layer's cache."""
    kinds, kwargs = get_layer_types_and_kwargs(config)
    if isinstance(kwargs, dict):  # before transformers 5.20: one dict for all layers
        kwargs = [kwargs] * len(kinds)
    return kinds, kwargs


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads and their width."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width


def sliding_elements(config: Any) -> int:
    """Numbers that the sliding layers hold per row, once their windows are full."""
    kinds, kwargs = layer_kinds(config)
    heads, width = kv_shape(config)
    windows = [
        extra.get("sliding_window") or 0
        for kind, extra in zip(kinds, kwargs, strict=True)
        if kind != "full_attention"
    ]
    return 2 * heads * width * sum(windows)


def release(layer: Any) -> None:
    """Let go of what a sliding layer no longer shows: it keeps a view of the whole last chunk."""
    window = getattr(layer, "sliding_window", None)
    if window is None or getattr(layer, "record_past", False):
        return
    for name in ("keys", "values"):
        x = getattr(layer, name)
        room = x.untyped_storage().nbytes() // x.element_size()
        if room > x.shape[0] * x.shape[1] * x.shape[3] * window:
            setattr(layer, name, x.clone())

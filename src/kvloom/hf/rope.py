"""Probe a model's rotary embedding into a `RopeSpec`, and check it against the model's own code."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from kvloom.positions import RopeSpec

_REFUSED = ("dynamic", "longrope")


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder's attention modules by layer index."""
    found: dict[int, nn.Module] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        if index is not None and "Attention" in type(module).__name__:
            found.setdefault(int(index), module)
    return found


def decoder_of(model: Any) -> Any:
    """The stack of layers inside a causal language model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder if decoder is not None else model


def rope_of(model: nn.Module, layer: int) -> RopeSpec:
    """The rotation of one layer. Raises ValueError, with the reason, if kvloom cannot know it."""
    decoder = decoder_of(model)
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise ValueError(f"{type(model).__name__} has no rotary_emb: pre-RoPE keys and in-cache "
                         "positions need rotary positions")  # fmt: skip
    module = attention_modules(model)[layer]
    kind = getattr(module, "layer_type", None)
    rope_type = rotary.rope_type[kind] if isinstance(rotary.rope_type, dict) else rotary.rope_type
    if rope_type in _REFUSED:
        raise ValueError(
            f"rope type {rope_type!r} changes its frequencies with the length, so that stored keys "
            "cannot be moved or un-rotated; use original positions and post-RoPE formats"
        )
    inv_freq = getattr(rotary, f"{kind}_inv_freq", None)
    inv_freq = getattr(rotary, "inv_freq", None) if inv_freq is None else inv_freq
    scale = getattr(rotary, f"{kind}_attention_scaling", None)
    scale = getattr(rotary, "attention_scaling", 1.0) if scale is None else scale
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if inv_freq is None or apply is None:
        raise ValueError(f"{type(rotary).__name__}: no inv_freq or apply_rotary_pos_emb to probe")
    return _matching(rotary, module, apply, inv_freq.detach().float().cpu(), float(scale or 1.0))


def _matching(
    rotary: nn.Module, module: nn.Module, apply: Any, inv_freq: torch.Tensor, scale: float
) -> RopeSpec:
    """The pairing under which our rotation equals the model's own on random keys."""
    width = _head_dim(module, inv_freq)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 5, width, generator=generator)
    positions = torch.tensor([[0, 1, 7, 100, 1000]])
    kind = getattr(module, "layer_type", None)
    device = next(rotary.buffers()).device
    with torch.no_grad():
        inputs = (keys.to(device), positions.to(device))
        both = isinstance(getattr(rotary, "rope_type", None), dict)
        cos, sin = rotary(*inputs, kind) if both else rotary(*inputs)
        wanted = apply(inputs[0], inputs[0], cos, sin)[1].cpu()
    for pairing in ("half", "interleaved"):
        spec = RopeSpec(inv_freq, 2 * inv_freq.numel(), pairing, scale)
        if torch.allclose(spec.rotate(keys, positions[:, None]), wanted, atol=1e-4):
            return spec
    raise ValueError(
        f"{type(module).__name__}: its rotary embedding matches neither pairing that kvloom knows "
        "(half, interleaved)"
    )


def _head_dim(module: Any, inv_freq: torch.Tensor) -> int:
    for name in ("head_dim", "head_size"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return 2 * inv_freq.numel()

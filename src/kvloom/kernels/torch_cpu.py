"""The fast path that needs nothing but torch: its CPU flash attention, which returns a log-sum-exp.

`torch.nn.functional.scaled_dot_product_attention` hides the log-sum-exp; the ATen op beneath it
does not. Queries of one group are rows of one call, so each key byte is read once per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

# below this a log-sum-exp can only come from masked entries
_EMPTY = torch.finfo(torch.float32).min / 4
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH = getattr(_FLASH, "default", None)


def why_not(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> str | None:
    """The reason why this path cannot serve a call, or None."""
    if _FLASH is None:
        return "this torch has no CPU flash attention op"
    if keys.device.type != "cpu":
        return f"the tensors are on {keys.device.type}, not on the CPU"
    if softcap is not None:
        return "the op knows no softcap"
    if keys.shape[-1] != values.shape[-1]:
        return f"keys and values differ in width ({keys.shape[-1]} and {values.shape[-1]})"
    if not (query.dtype == keys.dtype == values.dtype):
        return f"mixed dtypes {query.dtype}, {keys.dtype}, {values.dtype}"
    if keys.shape[-2] == 0:
        return "there are no entries"
    return None


def _additive(
    bias: Tensor | None, mask: Tensor | None, shape: tuple[int, int, int, int]
) -> Tensor | None:
    """`bias` and `mask` as one fp32 tensor `[B, H or 1, Q or 1, S]` to add, finite everywhere."""
    if bias is None and mask is None:
        return None
    B, _, Q, S = shape
    total = torch.zeros((), dtype=torch.float32)
    if bias is not None:
        total = total + bias.float()[:, :, None, :]
    if mask is not None:
        total = total.masked_fill(~mask.expand(B, -1, Q, S), float("-inf"))
    return total.clamp_min(torch.finfo(torch.float32).min / 2)


def partial_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.partial_attention`; `out` stays in the input's dtype."""
    assert _FLASH is not None
    B, H, G, Q, D = query.shape
    extra = _additive(bias, mask, (B, H, Q, keys.shape[-2]))
    if extra is not None:
        if extra.shape[2] > 1:
            extra = extra.unsqueeze(2).expand(B, H, G, Q, -1).reshape(B, H, G * Q, -1)
        extra = extra.expand(B, H, G * Q, -1)
    flat = query.reshape(B, H, G * Q, D)
    out, lse = _FLASH(flat, keys, values, 0.0, False, attn_mask=extra, scale=scale)
    out, lse = out.reshape(query.shape), lse.reshape(B, H, G, Q)
    if extra is not None:
        empty = lse < _EMPTY
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, float("-inf"))
    return out, lse


def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal self-attention of a chunk, without a mask in memory: one call per head of the group."""
    assert _FLASH is not None
    B, H, G, Q, _ = query.shape
    parts = [
        _FLASH(query[:, :, g].contiguous(), keys, values, 0.0, True, scale=scale) for g in range(G)
    ]
    out = torch.stack([out for out, _ in parts], dim=2)
    return out, torch.stack([lse.reshape(B, H, Q) for _, lse in parts], dim=2)

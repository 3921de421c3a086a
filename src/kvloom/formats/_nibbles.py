"""Two 4-bit codes per byte, and the asymmetric quantizer that makes them."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 15  # 2^4 - 1


def pack(codes: Tensor) -> Tensor:
    """`[..., D]` codes 0..15 -> uint8 `[..., D / 2]`: low nibble channel i, high nibble i + D / 2."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat([packed & 0xF, packed >> 4], dim=-1)


def quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric 4-bit codes of `x` with one fp16 scale and minimum per slice along `dim`.

    Returns codes like `x`, and `scale`, `minimum` in fp16 with `dim` kept as 1. The codes are
    made against the rounded scale, so that the error is at most half a step inside the range; a
    minimum beyond fp16 is clamped to its largest finite value.
    """
    x = x.float()
    limit = torch.finfo(torch.float16).max
    low = x.amin(dim, keepdim=True).clamp(-limit, limit).to(torch.float16)
    span = x.amax(dim, keepdim=True) - low.float()
    scale = (span / LEVELS).clamp(1e-7, limit).to(torch.float16)
    codes = torch.round((x - low.float()) / scale.float()).clamp_(0, LEVELS)
    return codes, scale, low


def dequantize(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """fp32 values from codes and broadcastable fp16 parameters."""
    return codes.float() * scale.float() + minimum.float()

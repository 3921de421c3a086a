"""Numbers that must not drift: token counts from log masses, and sums in the finest dtype of a device."""

from __future__ import annotations

import torch
from torch import Tensor


def counts_of(mass: Tensor) -> Tensor:
    """Tokens from log mass, exactly: whole numbers are restored, so that errors do not build up."""
    count = torch.exp(mass)
    rounding = 4 * torch.finfo(mass.dtype).eps * (2 + mass.abs()) * count
    whole = count.round()
    return torch.where((count - whole).abs() <= rounding, whole, count)


def finest(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a device that has no other (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64

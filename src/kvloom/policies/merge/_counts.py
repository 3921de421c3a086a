"""Numbers that must not drift: token counts from log masses, similarities that are compared, and sums in
the finest dtype of a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Similarities are whole multiples of 1 / UNIT: a token has nearly the same key wherever it occurs, and of
# several pairs that are equally close but for rounding, the same should merge in any batch.
UNIT = 2.0**16


def counts_of(mass: Tensor) -> Tensor:
    """Tokens from log mass, exactly: whole numbers are restored, so that errors do not build up."""
    count = torch.exp(mass)
    rounding = 4 * torch.finfo(mass.dtype).eps * (2 + mass.abs()) * count
    whole = count.round()
    return torch.where((count - whole).abs() <= rounding, whole, count)


def finest(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a device that has no other (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64

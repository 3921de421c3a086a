"""Draws that batching cannot change: hashes of who an entry is, not numbers from a generator."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

_WORD = (1 << 32) - 1


def draws(positions: Tensor, seed: int, *parts: int) -> Tensor:
    """One number in [0, 1) per entry, fp32, a multiple of 2^-24; equal arguments give equal numbers.

    A chain of murmur3 finalizers (A. Appleby) over seed, `parts`, KV head and position.
    `positions [B, H, S]` are original token indices; `parts` are the layer, and whatever tells one
    use of a seed from another.
    """
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    start = _mix(torch.tensor(seed & _WORD, device=positions.device))
    chain: tuple[int | Tensor, ...] = (*parts, heads, positions.long())
    word = reduce(lambda word, part: _mix(word ^ (part + 0x9E3779B9)), chain, start)
    return (word >> 8).float() / (1 << 24)


def _mix(word: Tensor) -> Tensor:
    """Murmur3's 32-bit finalizer; int64 products wrap, and only their low 32 bits count."""
    word = word & _WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)

"""Randomised Hadamard rotations: signs, then an orthonormal matrix of equal magnitudes.

    x -> (x * signs) @ M,   M orthonormal, so that dot products and norms stay what they are

An outlier channel is spread over all of its head, which makes one scale per token fair (QuaRot,
arXiv:2404.00456). Signs are drawn per layer and KV head; the query heads of a group use those of
their KV head.

M is of order 2^k, 12 * 2^k or 20 * 2^k, so that widths like 64, 80, 96, 128 and 256 are whole; others
are made of blocks, the largest powers of two first.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from kvloom.core.format import Place

CPU = torch.device("cpu")


def transform(x: Tensor, back: bool = False) -> Tensor:
    """`x [..., W] @ M`, or `x @ M.T`, by additions in an order that depends on nothing but W.

    A matrix product is free to add up differently for other batches, and codes would follow.
    """
    parts = x.split(_orders(x.shape[-1]), -1)
    return torch.cat([_block(part, back) for part in parts], -1)


@cache
def matrix(width: int, device: torch.device = CPU) -> Tensor:
    """M, fp32 `[width, width]`; one for all caches of a process."""
    return transform(torch.eye(width)).to(device)


@cache
def _orders(width: int) -> list[int]:
    """Orders of the blocks that make up a width."""
    orders = []
    while width:
        orders.append(width if _base(width) else 1 << (width.bit_length() - 1))
        width -= orders[-1]
    return orders


def _base(order: int) -> int:
    """1, 12 or 20 if `order` is that times a power of two, else 0."""
    return next((b for b in (12, 20, 1) if order % b == 0 and (order // b).bit_count() == 1), 0)


def _block(x: Tensor, back: bool) -> Tensor:
    """A whole matrix, the Kronecker product of 2 x 2 ones and one of order 1, 12 or 20."""
    order = x.shape[-1]
    base = _base(order)
    x = x.unflatten(-1, (order // base, base))
    if base > 1:
        rows = _paley(base - 1).T if back else _paley(base - 1)
        x = torch.stack([x[..., i, None] * rows[i].to(x.device) for i in range(base)]).sum(0)
    half = order // base
    while half > 1:
        half //= 2
        a, b = x.unflatten(-2, (-1, 2, half)).unbind(-3)
        x = torch.stack([a + b, a - b], -3).flatten(-4, -2)
    return x.flatten(-2) / math.sqrt(order)


@cache
def _paley(q: int) -> Tensor:
    """The Hadamard matrix of order q + 1 for a prime q = 3 mod 4: fp32, of +1 and -1."""
    squares = {i * i % q for i in range(1, q)}
    rows = [
        [0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)
    ]
    skew = torch.zeros(q + 1, q + 1)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = torch.tensor(rows)
    return skew + torch.eye(q + 1)


def signs(place: Place, width: int, seed: int, device: torch.device) -> Tensor:
    """+1 or -1, int8 `[heads, width]`, a function of the seed, the layer and the head."""
    rows = []
    for head in range(place.heads):
        generator = torch.Generator().manual_seed((seed * 1009 + place.layer) * 1009 + head)
        rows.append(torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1)
    return torch.stack(rows).to(device)


def turn(x: Tensor, signs: Tensor) -> Tensor:
    """`x [..., W]` in the rotated basis, fp32, in one product; `signs` broadcasts to `x`."""
    return (x.float() * signs) @ matrix(x.shape[-1], x.device)


def turn_back(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `turn`, fp32."""
    return (x.float() @ matrix(x.shape[-1], x.device).T) * signs

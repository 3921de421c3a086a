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


@cache
def matrix(width: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Tensor:
    """M, orthonormal `[width, width]`; one for all caches of a process."""
    blocks, rest = [], width
    while rest:
        order = rest if _exists(rest) else 1 << (rest.bit_length() - 1)
        blocks.append(_hadamard(order) / math.sqrt(order))
        rest -= order
    made: Tensor = torch.block_diag(*blocks)
    return made.to(device, dtype)


@cache
def back(width: int, device: torch.device = CPU) -> Tensor:
    """The transpose of `matrix`, with rows of its own."""
    return matrix(width, device).T.contiguous()


def transform(x: Tensor, back: bool = False) -> Tensor:
    """`x [..., W] @ M`, or `x @ M.T`, in fp64, rounded to fp32.

    A product in fp32 may add up in another order for other batches, and codes would follow.
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # which MPS does not have
    m = matrix(x.shape[-1], x.device, dtype)
    return (x.to(dtype) @ (m.T if back else m)).float()


def _exists(order: int) -> bool:
    return any(order % base == 0 and (order // base).bit_count() == 1 for base in (1, 12, 20))


def _hadamard(order: int) -> Tensor:
    if order in (12, 20):
        return _paley(order - 1)
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), _hadamard(order // 2))


def _paley(q: int) -> Tensor:
    """The Hadamard matrix of order q + 1 for a prime q = 3 mod 4."""
    squares = {i * i % q for i in range(1, q)}
    rows = [
        [0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)
    ]
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = torch.tensor(rows)
    return skew + torch.eye(q + 1, dtype=torch.float64)


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

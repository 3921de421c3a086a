"""Randomised Hadamard rotations: signs, then an orthonormal matrix of equal magnitudes.

    x -> (x * signs) @ M,   M orthonormal, so that dot products and norms stay what they are

An outlier channel is spread over all of its head, which makes one scale per token fair (QuaRot,
arXiv:2404.00456). Signs are drawn per layer and KV head; the query heads of a group use those of
their KV head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from kvloom.core.format import PageBatch, PageFormat, Part, Place, Stored

CPU = torch.device("cpu")


@cache
def matrix(width: int, device: torch.device = CPU) -> Tensor:
    """Orthonormal fp32 `[width, width]`; one for all caches of a process.

    Of order 2^k, 12 * 2^k or 20 * 2^k (so 64, 80, 96, 128, 256 are whole); other widths are made of
    blocks of 2^k, the largest powers first.
    """
    blocks, rest = [], width
    while rest:
        order = rest if _exists(rest) else 1 << (rest.bit_length() - 1)
        blocks.append(_hadamard(order))
        rest -= order
    made: Tensor = torch.block_diag(*(block / block.shape[0] ** 0.5 for block in blocks))
    return made.float().to(device)


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
    """`x [..., W]` in the rotated basis, fp32; `signs` broadcasts to `x`."""
    return (x.float() * signs) @ matrix(x.shape[-1], x.device)


def turn_back(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `turn`, fp32."""
    return (x.float() @ matrix(x.shape[-1], x.device).T) * signs


class Rotated(PageFormat, ABC):
    """Base of formats that may hold keys, values or both in a rotated basis.

    Subclasses name the parts in `rotated`, have a `seed`, encode what `in_basis` gives, and
    implement `read`.
    """

    seed: int = 0

    @property
    @abstractmethod
    def rotated(self) -> tuple[Part, ...]:
        """What is rotated: keys, values, both, or nothing."""

    @property
    def turns(self) -> bool:
        return bool(self.rotated)

    def tables(self, place: Place, device: torch.device) -> dict[str, Tensor]:
        made = {}
        if "key" in self.rotated:
            made["key_signs"] = signs(place, place.key_dim, 2 * self.seed, device)
        if "value" in self.rotated:
            made["value_signs"] = signs(place, place.value_dim, 2 * self.seed + 1, device)
        return made

    def in_basis(self, batch: PageBatch) -> tuple[Tensor, Tensor]:
        """Keys and values `[N, 64, W]` in the basis in which they are stored."""
        both = []
        for part, x in (("key", batch.keys), ("value", batch.values)):
            table = batch.tables.get(f"{part}_signs")
            both.append(x if table is None else turn(x, table[batch.head][:, None]))
        return both[0], both[1]

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not self.turns:
            return self.read(stored, dtype)
        keys, values = self.read(stored, torch.float32)
        if "key_signs" in stored.tables:
            keys = turn_back(keys, stored.tables["key_signs"][:, None])
        if "value_signs" in stored.tables:
            values = turn_back(values, stored.tables["value_signs"][:, None])
        return cast(keys, dtype), cast(values, dtype)

    def turn_query(self, query: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        if "key" not in self.rotated:
            return query
        return turn(query, tables["key_signs"][:, None, None]).to(query.dtype)

    def turn_back(self, out: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        if "value" not in self.rotated:
            return out
        return turn_back(out, tables["value_signs"][:, None, None]).to(out.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `x` in `dtype`. What was rounded may lie past the end of fp16: it saturates."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype) if dtype == torch.float16 else x.to(dtype)

"""Formats that hold keys, values or both in a rotated basis; queries and outputs turn instead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import PageBatch, PageFormat, Part, Place, Stored
from kvloom.formats import _hadamard
from kvloom.kernels.layout import cast


@dataclass(frozen=True)
class Turning:
    """A rotation of pages: `signs` int8 `[H, W]`, and the `head` of each page, host int64 `[N]`."""

    signs: Tensor
    head: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Pages `[N, 64, W]` in the rotated basis, fp32, from fp64."""
        return _hadamard.transform(x.float() * self.signs[self.head][:, None])

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Signs, matrix and heads as `triton_backend.encode` takes them."""
        device = self.signs.device
        heads = self.head.to(torch.int32).to(device, non_blocking=True)
        return self.signs, _hadamard.matrix(self.signs.shape[1], device), heads


class Rotated(PageFormat, ABC):
    """Base of formats that may rotate.

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
            made["key_signs"] = _hadamard.signs(place, place.key_dim, 2 * self.seed, device)
        if "value" in self.rotated:
            made["value_signs"] = _hadamard.signs(place, place.value_dim, 2 * self.seed + 1, device)
        return made

    def in_basis(self, batch: PageBatch) -> tuple[Tensor, Tensor]:
        """Keys and values `[N, 64, W]` in the basis in which they are stored."""
        turnings = self.turnings(batch)
        keys, values = (
            x if turn is None else turn(x)
            for x, turn in zip((batch.keys, batch.values), turnings, strict=True)
        )
        return keys, values

    def turnings(self, batch: PageBatch) -> tuple[Turning | None, Turning | None]:
        """The rotations of keys and values, None where there is none."""
        signs = batch.tables.get("key_signs"), batch.tables.get("value_signs")
        key, value = (None if x is None else Turning(x, batch.head) for x in signs)
        return key, value

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not self.turns:
            return self.read(stored, dtype)
        keys, values = self.read(stored, torch.float32)
        if "key_signs" in stored.tables:
            keys = _hadamard.transform(keys, back=True) * stored.tables["key_signs"][:, None]
        if "value_signs" in stored.tables:
            values = _hadamard.transform(values, back=True) * stored.tables["value_signs"][:, None]
        return cast(keys, dtype), cast(values, dtype)

    def turn_query(self, query: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        if "key" not in self.rotated:
            return query
        return _hadamard.turn(query, tables["key_signs"][:, None, None]).to(query.dtype)

    def turned_by(self, tables: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        by = {}
        if "key" in self.rotated:
            signs = tables["key_signs"]
            by["key"] = _hadamard.matrix(signs.shape[1], signs.device), signs
        if "value" in self.rotated:
            signs = tables["value_signs"]
            by["value"] = _hadamard.back(signs.shape[1], signs.device), signs
        return by

    def turn_back(self, out: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        if "value" not in self.rotated:
            return out
        return _hadamard.turn_back(out, tables["value_signs"][:, None, None]).to(out.dtype)

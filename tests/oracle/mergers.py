"""What the mask-only oracle believes that mergers do: every evicted token is kept, and counted.

`ORACLES` maps a centroid merger's name to a function that computes its centroids the slow, obvious
way from all tokens that were ever evicted. A merger without one is replayed with its own `ingest`,
head by head, which tests all that surrounds it; its arithmetic is then its own test's business. The
same goes for survivor mergers, which are asked for one head alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvloom.core.block import Block
from kvloom.core.merge import Group, Losers, Memory, Merged


@dataclass
class Centroids:
    """Keys `[..., n, D]`, values, log mass `[..., n]` (-inf: empty), mean positions, and what is added to
    the logits.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor
    positions: Tensor
    bias: Tensor


Batch = tuple[Tensor, Tensor, Tensor]  # keys before rotation [N, D], values [N, E], positions [N]


@dataclass
class Folded:
    """Everything that one KV head of one row ever gave away, by compression."""

    batches: list[Batch] = field(default_factory=list)
    latest: Centroids | None = None
    replayed: tuple[Block, Memory] | None = (
        None  # what `replay` made of batches that are no longer held
    )

    def copy(self) -> Folded:
        return Folded(list(self.batches), self.latest, self.replayed)

    def take(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.batches.append((keys, values, positions))
        self.latest = None

    def centroids(self, merger: Any, keys: Tensor, values: Tensor) -> Centroids:
        """`keys` and `values` only give the widths."""
        if self.latest is None:
            empty = _empty(merger.centroids, keys.shape[-1], values.shape[-1])
            gave = [batch for batch in self.batches if len(batch[2])]
            if merger.name in ORACLES:
                self.latest = ORACLES[merger.name](merger, gave, empty) if gave else empty
            else:  # one compression after the other, and none twice
                self.replayed = replay(merger, gave, self.replayed or _start(merger, empty))
                self.batches, self.latest = [], _as_attended(merger, self.replayed[0])
        return self.latest


def _empty(n: int, key_dim: int, value_dim: int) -> Centroids:
    mass = torch.full((n,), float("-inf"))
    zero = torch.zeros(n)
    return Centroids(torch.zeros(n, key_dim), torch.zeros(n, value_dim), mass, zero, mass)


def mean_centroid(merger: Any, batches: list[Batch], empty: Centroids) -> Centroids:
    """The plain mean of all tokens, which counts for as many as they are."""
    keys, values, positions = (torch.cat(x).double() for x in zip(*batches, strict=True))
    mass = torch.tensor([float(len(positions))]).log()
    means = [x.mean(0, keepdim=True).float() for x in (keys, values, positions)]
    return Centroids(means[0], means[1], mass, means[2], mass)


def _start(merger: Any, empty: Centroids) -> tuple[Block, Memory]:
    meta = {"mass": empty.mass[None, None], "positions": empty.positions[None, None]}
    none = torch.zeros(1, 1, dtype=torch.int64)
    block = Block(empty.keys[None, None], empty.values[None, None], none, meta)
    return block, merger.memory(1, 1)


def replay(merger: Any, batches: list[Batch], before: tuple[Block, Memory]) -> tuple[Block, Memory]:
    """The merger's own `ingest`, one compression after the other."""
    block, memory = before
    for keys, values, positions in batches:
        valid = torch.ones(1, 1, len(positions), dtype=torch.bool)
        mass = torch.zeros(1, 1, len(positions))
        losers = Losers(keys[None, None], values[None, None], mass, positions[None, None], valid)
        block, memory = merger.ingest(losers, block, memory)
    return block, memory


def _as_attended(merger: Any, block: Block) -> Centroids:
    used = block.valid(block.keys.shape[2])[0, 0]
    mass = block.meta["mass"][0, 0].masked_fill(~used, float("-inf"))
    bias = merger.bias(block)[0, 0].masked_fill(~used, float("-inf"))
    keys, values = block.keys[0, 0], block.values[0, 0]
    return Centroids(keys, values, mass, block.meta["positions"][0, 0], bias)


class Survivors:
    """What a survivor merger remembers of one KV head of one row."""

    def __init__(self, merger: Any):
        self.memory = {} if merger is None else merger.memory(1, 1)

    def merge(self, merger: Any, group: Group, head: int) -> Merged:
        if merger.name in DRAWS:
            return _as_head(merger, group, head)
        made = merger.merge(group)
        self.memory = made.memory or self.memory
        return made


DRAWS = {"cam"}  # what they do depends on which head it is


def _as_head(merger: Any, group: Group, head: int) -> Merged:
    """The group in the place of that head, behind copies of itself."""
    tensors = {f.name: getattr(group, f.name) for f in fields(group)}
    copies = {
        name: x.expand(-1, head + 1, *x.shape[2:])
        for name, x in tensors.items()
        if isinstance(x, Tensor)
    }
    made = merger.merge(replace(group, **copies))
    return Merged(made.values[:, head:], folded=made.folded[:, head:])


ORACLES: dict[str, Callable[[Any, list[Batch], Centroids], Centroids]] = {
    "mean_centroid": mean_centroid,
}

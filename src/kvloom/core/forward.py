"""One forward's tokens on their way into a layer, and what has happened in a layer so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.attend import Call
from kvloom.core.block import Block


@dataclass
class Forward:
    """The tokens of one forward, not yet part of the cache.

    Attributes:
        block: the new tokens, one slot per column.
        call: the attention call, lse: its normaliser (kept only if a policy observes attention).
        tokens: valid tokens per row, host int64 `[B]`. positions: `[B, Q]`.
        columns: bool `[B, Q]`, which columns are valid; None: all.
        in_tail: whether the token was written straight into the tail.
    """

    block: Block
    call: Call
    tokens: Tensor
    positions: Tensor
    lse: Tensor | None = None
    columns: Tensor | None = None
    in_tail: bool = False

    def without_newest(self, drop: int) -> Block:
        """Forget the newest `drop` columns (rejected drafts), here and in the call; returns the rest."""
        block = self.block
        if drop == 0:
            return block
        kept = block.longest - drop
        columns = self.columns
        self.tokens = self.tokens - (drop if columns is None else columns[:, kept:].sum(1).cpu())
        self.columns = None if columns is None else columns[:, :kept]
        self.positions = self.positions[:, :kept]
        call = self.call
        call.query = call.query[..., :kept, :]
        call.new_mask = None if call.new_mask is None else call.new_mask[..., :kept, :kept]
        call.past_mask = None if call.past_mask is None else call.past_mask[..., :kept, :]
        call.voters = None if call.voters is None else call.voters[:, :kept]
        self.lse = None if self.lse is None else self.lse[..., :kept]
        return block.each(lambda x: x[:, :, :kept], block.count - drop)


@dataclass(frozen=True)
class Sealing:
    """What takes back a commit that sealed entries.

    Attributes:
        tokens: valid tokens per row that it brought, host int64 `[B]`. tail: as it was before.
        entries: how many were sealed, host int64 `[B, H]`.
    """

    tokens: Tensor
    tail: Block
    entries: Tensor


@dataclass
class Counters:
    """What happened in a layer so far."""

    compressions: int = 0
    evicted: int = 0
    merged: int = 0
    sealed: int = 0
    compactions: int = 0


def last_valid(positions: Tensor, columns: Tensor | None) -> Tensor:
    """Position of each row's last valid column, int64 `[B]`."""
    if columns is None:
        return positions[:, -1].to(torch.int64)
    steps = torch.arange(1, columns.shape[1] + 1, device=columns.device)
    last = (columns * steps).argmax(-1, keepdim=True)
    return positions.gather(1, last)[:, 0].to(torch.int64)

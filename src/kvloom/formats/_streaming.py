"""Statistics that follow a stream: chunks of pages, moving absmax per channel, outlier channels.

For the chunks of one (row, KV head) in the order of time, with a_c the largest |x_c| of a chunk:

    first chunk   e = a
    outliers      a_c > relative * e_c   or   a_c > absolute        (before e is updated)
    then          e <- decay * e + (1 - decay) * a                  (what scales are made of)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.core.format import PAGE, PageBatch, Place
from kvloom.core.policy import check

BITS = (2, 3, 4, 8, 16)


def check_parameters(fmt: Any) -> None:
    """Raise ValueError if a parameter of streaming_kvquant is none."""
    for name in ("key_bits", "value_bits", "key_outlier_bits", "value_outlier_bits"):
        bits = getattr(fmt, name)
        check(fmt, bits != 1, f"{name}: a symmetric scale of 1 bit divides by 2^0 - 1 = 0")
        check(fmt, type(bits) is int and bits in BITS, f"{name} is one of {BITS}")
    whole = type(fmt.chunk) is int and fmt.chunk > 0 and fmt.chunk % PAGE == 0
    check(fmt, whole, f"chunk is a multiple of {PAGE} tokens")
    check(fmt, _number(fmt.decay) and 0 < fmt.decay < 1, "decay is between 0 and 1")
    check(fmt, _number(fmt.relative) and fmt.relative > 1, "relative is above 1")
    sound = fmt.absolute is None or (_number(fmt.absolute) and fmt.absolute > 0)
    check(fmt, sound, "absolute is above 0, or None")
    for name, least in (("sinks", 0), ("room", 1), ("value_groups", 0), ("reset", 0)):
        value = getattr(fmt, name)
        check(fmt, type(value) is int and value >= least, f"{name} is an int >= {least}")
    check(fmt, fmt.rope in ("pre", "post", "pair"), "rope is 'pre', 'post' or 'pair'")
    for name in ("detect", "key_per_channel", "mixed_precision", "adaptive", "clip"):
        check(fmt, type(getattr(fmt, name)) is bool, f"{name} is True or False")


def _number(x: Any) -> bool:
    return type(x) in (int, float)


@dataclass(frozen=True)
class Chunks:
    """M runs of pages of one (row, head) each, which share scales.

    Attributes:
        of: int64 `[N]`, the chunk of each page. row, head: int64 `[M]`, the owners.
        turn: int64 `[M]`, how many chunks of the same owner come before, in this batch.
    """

    of: Tensor
    row: Tensor
    head: Tensor
    turn: Tensor

    @classmethod
    def of_pages(cls, batch: PageBatch, most: int, ends: Tensor | None = None) -> Chunks:
        """Up to `most` pages in each; `ends` (host bool `[N]`) tells the pages before which a chunk ends
        anyway.
        """
        place = _places(batch)
        starts = place == 0 if ends is None else ends | (place == 0)
        since = torch.arange(len(place))
        since = since - torch.where(starts, since, 0).cummax(0).values  # pages since such an end
        starts = since % most == 0
        firsts = starts.nonzero()[:, 0]
        own = place[firsts] == 0  # the first chunk of its owner
        nth = torch.arange(len(firsts))
        turn = nth - torch.where(own, nth, 0).cummax(0).values
        parts = (starts.cumsum(0) - 1, batch.row[firsts], batch.head[firsts], turn)
        device = batch.keys.device
        return cls(*(x.to(device=device, dtype=torch.int64) for x in parts))

    def largest(self, peaks: Tensor) -> Tensor:
        """The largest of the pages' `peaks [N, W]` in each chunk, `[M, W]`."""
        a = peaks.new_zeros(len(self.turn), peaks.shape[1])
        return a.scatter_reduce(0, self.of[:, None].expand_as(peaks), peaks, "amax")


def _places(batch: PageBatch) -> Tensor:
    """Place of each page among those of its owner in the batch, host int64 `[N]`."""
    owner, n = batch.row * batch.heads + batch.head, torch.arange(len(batch.row))
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    return n - torch.where(first, n, 0).cummax(0).values


def shifts(peaks: Tensor, batch: PageBatch, most: int, ratio: float) -> Tensor:
    """Whether each page has a channel above `ratio` times what its chunk has seen so far, host bool `[N]`.

    `peaks [N, W]`; chunks are those which these very ends make. Pages of an owner are consecutive. Waits for
    the device.
    """
    place, peaks = _places(batch), peaks.cpu()
    owner = batch.row * batch.heads + batch.head
    held = peaks.new_zeros(batch.rows * batch.heads, peaks.shape[1])
    length, ends = torch.zeros(len(held), dtype=torch.int64), torch.zeros(len(place)).bool()
    for nth in range(int(place.max()) + 1):  # a page of every owner at a time
        at = (place == nth).nonzero()[:, 0]
        mine = owner[at]
        full = (length[mine] == most) | (nth == 0)
        ends[at] = ~full & (peaks[at] > ratio * held[mine]).any(1)
        new = full | ends[at]
        held[mine] = torch.where(new[:, None], peaks[at], torch.maximum(held[mine], peaks[at]))
        length[mine] = torch.where(new, 1, length[mine] + 1)
    return ends


@dataclass(frozen=True)
class Rule:
    """How statistics are kept.

    Attributes:
        pages: at most in one chunk. adaptive: a chunk also ends before a page that has a channel
            above `relative` times what the chunk has seen so far.
        decay, relative, absolute: see above. reset: after how many chunks e starts over; 0: never.
        clip: whether scales are made of e alone, or of the larger of e and a.
    """

    pages: int
    adaptive: bool
    decay: float
    reset: int
    relative: float
    absolute: float | None
    clip: bool

    def chunks(self, batch: PageBatch, peaks: Tensor) -> Chunks:
        """The batch's pages in chunks; `peaks [N, W]` are those of keys and values together."""
        ends = shifts(peaks, batch, self.pages, self.relative) if self.adaptive else None
        return Chunks.of_pages(batch, self.pages, ends)

    def follow(
        self, e: Tensor, updates: Tensor, a: Tensor, chunks: Chunks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`e [rows, heads, W]` after all chunks; and for each of them, `[M, W]`, e before it and what its
        scales are made of.

        `a [M, W]`: absmax of the chunks; `updates [rows, heads]`: how many there were before.
        """
        e, before, after = e.clone(), torch.empty_like(a), torch.empty_like(a)
        turn = 0
        while (at := (chunks.turn == turn).nonzero()[:, 0]).numel():
            row, head = chunks.row[at], chunks.head[at]
            count = updates[row, head] + turn
            fresh = (count % self.reset if self.reset else count) == 0
            before[at] = torch.where(fresh[:, None], a[at], e[row, head])
            after[at] = e[row, head] = self.decay * before[at] + (1 - self.decay) * a[at]
            turn += 1
        return e, before, after if self.clip else torch.maximum(after, a)

    def severity(self, a: Tensor, before: Tensor) -> Tensor:
        """How far each channel is above its threshold, `[M, W]`; outliers are above 1."""
        worst = torch.where(a > 0, a / (self.relative * before), 0.0)
        return worst if self.absolute is None else torch.maximum(worst, a / self.absolute)


def counted(updates: Tensor, chunks: Chunks) -> Tensor:
    """`updates [rows, heads]` after these chunks."""
    one = torch.ones_like(chunks.turn, dtype=updates.dtype)
    return updates.index_put((chunks.row, chunks.head), one, accumulate=True)


def partners(place: Place, device: torch.device) -> dict[str, Tensor]:
    """The other channel of each one's rotary pair, int16 `[H, D]`; itself if it is not rotated."""
    if place.rope is None:
        raise ValueError("rope='pair' needs a model with rotary positions")
    other = torch.arange(place.key_dim, dtype=torch.int16)
    turned = other[: place.rope.n_rot]
    if place.rope.pairing == "half":
        turned.copy_(turned.roll(len(turned) // 2))
    else:
        turned.copy_(turned.unflatten(0, (-1, 2)).flip(1).flatten())
    return {"partner": other.to(device).repeat(place.heads, 1)}


def peaks(x: Tensor, partner: Tensor | None) -> Tensor:
    """The largest magnitudes of pages `x [N, 64, W]`, fp32 `[N, W]`: of channels, or radii of pairs."""
    if partner is None:
        return x.float().abs().amax(1)
    channel = torch.arange(x.shape[2], device=x.device)
    square = x.float().square()
    radius = square + square[..., partner.long()] * (partner != channel)
    return radius.amax(1).sqrt()

"""Logits of a block of pages, without scale: queries times keys, in the order of tokens.

Packed keys are never put together. Products of one e (see `codes`) take channels 4 quad + e, all quads
being the reduction, so that words become operands as they lie in memory:

    s[m, token] = sum over e of  q_e[m, quad] . k_e[quad, token]      for both halves of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.codes import (
    affine,
    code_in,
    halved,
    key_number,
    level_of,
    token_affine,
    words,
)
from kvloom.kernels.triton.spec import (
    CODES,
    LANES,
    POSITION_SLOTS,
    POSITIONS,
    TILE,
    pointer,
    product,
)


@triton.jit
def load_queries(query, rows, exists, S: tl.constexpr, DTYPE: tl.constexpr):
    """Queries at `rows [M]`: `[M, quads]` for every e, or `[M, block]` if keys are dense."""
    if S.packed:
        channel = 4 * tl.arange(0, S.quads)[None, :]
        found = ()
        for e in tl.static_range(4):
            mask = exists[:, None] & (channel + e < S.width)
            x = tl.load(query + rows[:, None] + channel + e, mask=mask, other=0.0)
            found = found + (x.to(DTYPE),)  # noqa: RUF005
        return found
    else:
        channel = tl.arange(0, S.block)[None, :]
        mask = exists[:, None] & (channel < S.width)
        return (tl.load(query + rows[:, None] + channel, mask=mask, other=0.0).to(DTYPE),)


@triton.jit
def rotation(channel, position, frequencies, R: tl.constexpr):
    """`(partner, cosine, sine)`: a rotated channel is `x cosine + x[partner] sine`."""
    turned = channel < R.rotated
    if R.interleaved:
        partner, pair = channel ^ 1, channel // 2
        first = channel % 2 == 0
    else:
        first = channel < R.rotated // 2
        partner = tl.where(first, channel + R.rotated // 2, channel - R.rotated // 2)
        pair = tl.where(first, channel, channel - R.rotated // 2)
    frequency = tl.load(frequencies + pair, mask=turned, other=0.0)
    angle = position.to(tl.float32) * frequency
    cosine = tl.where(turned, tl.cos(angle) * R.scale, 1.0)
    sine = tl.where(turned, tl.sin(angle) * tl.where(first, -R.scale, R.scale), 0.0)
    return tl.where(turned, partner, channel), cosine, sine


@triton.jit
def positions_of(row, cell, slot, exists):
    """Original positions of slots of a (row, head)."""
    at = pointer(row, POSITIONS, tl.int32) + cell * tl.load(row + POSITION_SLOTS)
    return tl.load(at + slot, mask=exists, other=0)


@triton.jit
def turned(
    x, row, head, cell, frequencies, tile0, slot0, t, token, channel, here,
    S: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Keys rotated to their positions; partners are decoded once more."""
    position = positions_of(row, cell, slot0 + t * TILE + token, here)
    partner, cosine, sine = rotation(channel, position, frequencies, R)
    return x * cosine + sine * key_number(row, head, tile0 + t, token, partner, here, S)


@triton.jit
def packed_logits(
    q, row, head, cell, frequencies, tile0, slot0, tiles,
    S: tl.constexpr, R: tl.constexpr, M: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`[M, T * 32]` for T tiles of which `tiles` exist."""
    quad = tl.arange(0, S.quads)[:, None, None]
    t, lane = tl.arange(0, T)[None, :, None], tl.arange(0, LANES)[None, None, :]
    exists = t < tiles
    here = exists & (4 * quad < S.padded) & (lane >= 0)
    at = (tile0 + t).to(tl.int64) * S.words
    codes = pointer(row, CODES, tl.int32)
    low0, high0 = words(codes, at, quad, 0, lane, here, S)
    low1, high1 = low0, high0
    if S.bits == 8:  # narrower codes of both halves share their words
        low1, high1 = words(codes, at, quad, 1, lane, here, S)
    first = tl.full((M, T * LANES), 0.0, tl.float32)
    second = tl.full((M, T * LANES), 0.0, tl.float32)
    for e in tl.static_range(4):
        channel = 4 * quad + e
        x0 = level_of(code_in(low0, high0, quad, 0, e, S), row, head, S, 0)
        x1 = level_of(code_in(low1, high1, quad, 1, e, S), row, head, S, 0)
        if not S.folded or R is not None:
            some = channel < S.width
            scale, zero = affine(row, tile0 + t, head, lane, channel, exists, some, S, 0)
            x0 = x0 * scale + zero
            if S.per_token:
                scale, zero = affine(
                    row, tile0 + t, head, lane + LANES, channel, exists, some, S, 0
                )
            x1 = x1 * scale + zero
            if R is not None:
                x0 = turned(x0, row, head, cell, frequencies, tile0, slot0, t, lane, channel,
                            here & some, S, R)  # fmt: skip
                x1 = turned(x1, row, head, cell, frequencies, tile0, slot0, t, lane + LANES, channel,
                            here & some, S, R)  # fmt: skip
        k0 = tl.reshape(halved(x0, DTYPE), (S.quads, T * LANES))
        first = product(q[e], k0, first)
        k1 = tl.reshape(halved(x1, DTYPE), (S.quads, T * LANES))
        second = product(q[e], k1, second)
    both = tl.reshape(tl.join(first, second), (M, T, LANES, 2))
    s = tl.reshape(tl.permute(both, (0, 1, 3, 2)), (M, T * TILE))
    if S.folded and R is None:
        scale, zero = token_affine(row, head, tile0, tiles, S, 0, T)
        total = tl.sum(q[0].to(tl.float32), 1) + tl.sum(q[1].to(tl.float32), 1)
        total += tl.sum(q[2].to(tl.float32), 1) + tl.sum(q[3].to(tl.float32), 1)
        s = s * scale[None, :] + total[:, None] * zero[None, :]
    return s


@triton.jit
def dense_logits(
    q, keys, stride, token, exists, position, frequencies,
    S: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`[M, N]` for entries at `token [N]`, `stride` numbers apart."""
    channel = tl.arange(0, S.block)[:, None]
    at = keys + token[None, :].to(tl.int64) * stride
    mask = exists[None, :] & (channel < S.width)
    x = tl.load(at + channel, mask=mask, other=0.0)
    if R is not None:
        partner, cosine, sine = rotation(channel, position[None, :], frequencies, R)
        other = tl.load(at + partner, mask=mask, other=0.0)
        x = halved(x.to(tl.float32) * cosine + sine * other.to(tl.float32), DTYPE)
    none = tl.full((M, N), 0.0, tl.float32)
    return product(q[0], x.to(DTYPE), none)

"""Weights times a block of values, added to two accumulators.

Packed values are read as keys are: of every e, tokens 4 quad + e, all quads of the block being the
reduction. The accumulators hold the channels of the two halves of each panel of 32 (the last 16 of an odd
multiple of 16 are in the first); of dense values, the first and the second half of all channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.codes import (
    affine,
    code_in,
    halved,
    level_of,
    token_affine,
    value_place,
    words,
)
from kvloom.kernels.triton.spec import CODES, LANES, PART, TILE, pointer, product


@triton.jit
def channels_of(half: tl.constexpr, S: tl.constexpr):
    """The channels of an accumulator's columns."""
    column = tl.arange(0, S.columns)
    if S.packed:
        return column // LANES * 32 + half * LANES + column % LANES
    else:
        return column + half * S.columns


@triton.jit
def by_element(p, M: tl.constexpr, T: tl.constexpr):
    """Weights `[M, T * 32]` of tokens 4 quad + e, `[M, T * 8]` for every e."""
    even, odd = tl.split(tl.reshape(p, (M, T * 8, 2, 2)))
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit
def value_words(codes, at, r, channel, here, HALF: tl.constexpr, S: tl.constexpr):
    """`(low, high, quad, half)` of the values of tokens 4 (r % 8) .. and `channel`."""
    if S.padded % 32 == 0:
        quad, start, half = r % 8, channel // 32 * (TILE * S.bits), HALF
    else:
        start, quad, half = value_place(4 * (r % 8), channel, S)
    low, high = words(codes, at + start, quad, half, channel % LANES, here, S)
    return low, high, quad, half


@triton.jit
def packed_half(
    acc, parts, low, high, quad, half, r, channel, row, head, tile, exists,
    S: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds the values of one half of all panels."""
    some = channel < S.width
    if not S.per_token:
        scale, zero = affine(row, tile, head, 0, channel, exists, some, S, 1)
    for e in tl.static_range(4):
        x = level_of(code_in(low, high, quad, half, e, S), row, head, S, 1)
        if S.per_token and not S.folded:
            token = 4 * (r % 8) + e
            scale, zero = affine(row, tile, head, token, channel, exists, some, S, 1)
        if not S.folded:
            x = x * scale + zero
        elif S.centre != 0:
            x = x - S.centre
        v = tl.reshape(halved(x, DTYPE), (T * 8, S.columns))
        acc = product(parts[e], v, acc)
    return acc


@triton.jit
def add_packed(
    acc0, acc1, p, row, head, tile0, tiles,
    S: tl.constexpr, M: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds `p [M, T * 32]` times the values of T tiles, of which `tiles` exist."""
    r = tl.arange(0, T * 8)[:, None, None]
    panel, lane = tl.arange(0, S.panels)[None, :, None], tl.arange(0, LANES)[None, None, :]
    tile, exists, channel = tile0 + r // 8, r // 8 < tiles, panel * 32 + lane
    at, codes = tile.to(tl.int64) * S.words, pointer(row, PART + CODES, tl.int32)
    if S.folded:
        scale, zero = token_affine(row, head, tile0, tiles, S, 1, T)
        zero = zero + scale * S.centre
        shift = tl.sum(p * zero[None, :], 1)[:, None]
        acc0, acc1, p = acc0 + shift, acc1 + shift, p * scale[None, :]
    parts = by_element(p.to(DTYPE), M, T)
    here = exists & (channel < S.padded)
    low, high, quad, half = value_words(codes, at, r, channel, here, 0, S)
    acc0 = packed_half(
        acc0, parts, low, high, quad, half, r, channel, row, head, tile, exists, S, T, DTYPE
    )
    channel = channel + LANES
    if S.bits == 8 or S.padded % 32 != 0:  # else both halves share their words
        here = exists & (channel < S.padded)
        low, high, quad, half = value_words(codes, at, r, channel, here, 1, S)
        acc1 = packed_half(
            acc1, parts, low, high, quad, half, r, channel, row, head, tile, exists, S, T, DTYPE
        )
    else:
        acc1 = packed_half(
            acc1, parts, low, high, quad, 1, r, channel, row, head, tile, exists, S, T, DTYPE
        )
    return acc0, acc1


@triton.jit
def add_dense(acc0, acc1, p, values, stride, token, exists, S: tl.constexpr, DTYPE: tl.constexpr):
    """Adds `p [M, N]` times the values at `token [N]`, `stride` numbers apart."""
    at = values + token[:, None].to(tl.int64) * stride
    p = p.to(DTYPE)
    channel = channels_of(0, S)[None, :]
    x = tl.load(at + channel, mask=exists[:, None] & (channel < S.width), other=0.0)
    acc0 = product(p, x.to(DTYPE), acc0)
    channel = channels_of(1, S)[None, :]
    x = tl.load(at + channel, mask=exists[:, None] & (channel < S.width), other=0.0)
    acc1 = product(p, x.to(DTYPE), acc1)
    return acc0, acc1

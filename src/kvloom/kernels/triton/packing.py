"""Writing packed codes: every word is put together from the codes that it holds.

The inverse of `codes`: word (vector, lane) of a panel holds the elements e = 0 .. 3 of a few (quad, half),
each shifted to its place. Where codes come from is another function's: `fetch(source, token, channel, mask, keys, spec)`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.spec import LANES, TILE


@triton.jit
def held_by(vector, I: tl.constexpr, BITS: tl.constexpr):
    """The I-th `(quad, half, shift)` of which a vector holds codes; 3 bits: `(.., is it the high bit)`."""
    if BITS == 8:
        return vector // 2, vector % 2, vector * 0, vector < 0
    elif BITS == 4:
        return vector, vector * 0 + I, vector * 0 + 4 * I, vector < 0
    elif BITS == 2:
        return (
            vector * 2 + I // 2,
            vector * 0 + I % 2,
            vector * 0 + 2 * (I % 2) + 4 * (I // 2),
            vector < 0,
        )
    else:
        group, which, half = vector // 3 * 4, vector % 3, vector * 0 + I % 2
        high = which == 2
        low_quad = group + 2 * which + I // 2
        quad = tl.where(high, group + I // 2, low_quad)
        place = tl.where(high, (I // 2) % 2 + I // 4 * 4, 4 * (I // 2))
        return quad, half, place + 2 * half, high


@triton.jit
def word_of(
    FETCH: tl.constexpr, source, n, mask, KEYS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Words `n` of a tile, int32."""
    BITS: tl.constexpr = S.bits
    COUNT: tl.constexpr = 1 if BITS == 8 else 2 if BITS == 4 else 4 if BITS == 2 else 8
    panel = n * 0 if KEYS else n // (TILE * BITS)
    inside = n if KEYS else n % (TILE * BITS)
    vector, lane, word = inside // LANES, inside % LANES, n * 0
    for i in tl.static_range(COUNT):
        quad, half, shift, high = held_by(vector, i, BITS)
        some = mask
        if BITS == 3 and i >= 4:  # low bits are of four, high bits of eight
            some = mask & high
        for e in tl.static_range(4):
            if KEYS:
                token, channel = half * LANES + lane, 4 * quad + e
            else:
                token, channel = 4 * quad + e, panel * 32 + half * LANES + lane
                if S.padded % 32 != 0:  # the last 16 channels
                    last = panel == S.padded // 32
                    token = tl.where(last, 8 * quad + 4 * half + e, token)
                    channel = tl.where(last, panel * 32 + lane, channel)
            code = FETCH(source, token, channel, some, KEYS, S)
            if BITS == 3:
                code = tl.where(high, (code >> 2) & 1, code & 3)
            word = word | tl.where(some, code << (8 * e + shift), 0)
    return word

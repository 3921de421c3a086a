"""Reading packed codes. The layout is drawn in `kvloom.kernels.layout`.

A word is 4 bytes of one (quad, lane): the 4 consecutive elements e of the reduction. Vectors of 16 words
(64 bytes) follow each other; which one holds a (quad, half), and where in its bytes, depends on the bits:

    bits   vector                    shift within byte e
    8      2 quad + half             0
    4      quad                      4 half
    2      quad / 2                  2 half + 4 (quad % 2)
    3      quad / 4 * 3 + quad % 4 / 2   as for 2 bits: the low ones
           quad / 4 * 3 + 2          (0, 1, 4, 5)[quad % 4] + 2 half: the high one

All functions are elementwise: quads, halves, lanes and elements are tensors that broadcast, or constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.spec import (
    LANES,
    LEVELS,
    PART,
    SCALE,
    SCALE_INDEX,
    TILE,
    ZERO,
    ZERO_INDEX,
    pointer,
)


@triton.jit
def vector_of(quad, half, S: tl.constexpr):
    """The vector that holds a code, or its low bits."""
    if S.bits == 8:
        return quad * 2 + half
    elif S.bits == 4:
        return quad + half * 0
    elif S.bits == 2:
        return quad // 2 + half * 0
    else:
        return quad // 4 * 3 + quad % 4 // 2 + half * 0


@triton.jit
def words(codes, at, quad, half, lane, mask, S: tl.constexpr):
    """The words of some codes, and those of their high bits (3 bits; else the same); `at` is the word
    at which their panel begins.
    """
    low = tl.load(codes + at + vector_of(quad, half, S) * LANES + lane, mask=mask, other=0)
    if S.bits == 3:
        high = at + (quad // 4 * 3 + 2) * LANES + lane + half * 0
        return low, tl.load(codes + high, mask=mask, other=0)
    else:
        return low, low


@triton.jit
def code_in(low, high, quad, half, e, S: tl.constexpr):
    """Codes from their words, int32."""
    if S.bits == 8:
        return (low >> (8 * e)) & 255
    elif S.bits == 4:
        return (low >> (8 * e + 4 * half)) & 15
    else:
        code = (low >> (8 * e + 2 * half + 4 * (quad % 2))) & 3
        if S.bits == 3:
            top = (high >> (8 * e + quad % 2 + quad % 4 // 2 * 4 + 2 * half)) & 1
            code += 4 * top
        return code


@triton.jit
def e4m3(code):
    """The numbers of FP8 codes, fp32; by hand, since GPUs before Ada have no such conversion."""
    sign, size, mantissa = code & 128, code & 127, code & 7
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, mantissa.to(tl.float32) * 0.001953125, normal)
    number = tl.where(size == 127, float("nan"), number)
    return tl.where(sign != 0, -number, number)


@triton.jit
def level_of(code, row, head, S: tl.constexpr, P: tl.constexpr):
    """What codes mean before their scale, fp32; `P`: 0 for keys, 1 for values."""
    if S.kind == "uniform":
        return code.to(tl.float32) - S.middle
    elif S.kind == "fp8":
        return e4m3(code)
    else:
        return tl.load(pointer(row, P * PART + LEVELS, tl.float32) + head * S.levels + code)


@triton.jit
def parameter(
    row, column, index_column, home: tl.constexpr, tile, head, inner, tiles, mask, P: tl.constexpr
):
    """fp16 parameters of tiles, fp32; `inner`: which of a tile's. `tiles`, `mask`: which exist."""
    numbers = pointer(row, P * PART + column, tl.float16)
    if home.where == "tile":
        at = tile.to(tl.int64) * home.stride
    elif home.where == "table":
        at = head * home.stride + tile * 0
    else:
        index = pointer(row, P * PART + index_column, tl.int32)
        held = tl.load(index + tile, mask=tiles, other=0)
        at = tl.maximum(held, 0).to(tl.int64) * home.stride
    return tl.load(numbers + at + inner, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inner_of(token, channel, S: tl.constexpr):
    """Which parameter of its tile (or set) belongs to a token and a channel."""
    if S.per_token:
        if S.group == 0 or S.group >= S.width:
            return token
        else:
            return channel // S.group * TILE + token
    else:
        if S.group == 0:
            return channel
        else:
            return channel // S.group


@triton.jit
def affine(row, tile, head, token, channel, tiles, channels, S: tl.constexpr, P: tl.constexpr):
    """`(scale, zero)` of some places, fp32; zero is a constant 0 where there is none. `tile`, `token`
    (within it) and `channel` broadcast, as `tiles` and `channels` do, which say where there are any; what
    a parameter does not depend on is not loaded again.
    """
    SCALES: tl.constexpr = S.scale
    ZEROS: tl.constexpr = S.zero
    inner = inner_of(token, channel, S)
    mask = tiles
    if not S.folded:
        mask = tiles & channels
    scale = parameter(row, SCALE, SCALE_INDEX, SCALES, tile, head, inner, tiles, mask, P)
    zero = scale * 0.0
    if S.zero is not None:
        zero = parameter(row, ZERO, ZERO_INDEX, ZEROS, tile, head, inner, tiles, mask, P)
    return scale, zero


@triton.jit
def token_affine(row, head, tile0, tiles, S: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """`(scale, zero)` of every token of T tiles, `[T * 32]`, where each has one of its own."""
    n = tl.arange(0, T * TILE)
    exists = n // TILE < tiles
    return affine(row, tile0 + n // TILE, head, n % TILE, 0, exists, exists, S, P)


@triton.jit
def halved(x, DTYPE: tl.constexpr):
    """`x` in `DTYPE`; what was rounded may lie past the end of fp16: it saturates."""
    if DTYPE == tl.float16:  # noqa: SIM300
        return tl.clamp(x, -65504.0, 65504.0).to(tl.float16)
    else:
        return x.to(DTYPE)


@triton.jit
def key_number(row, head, tile, token, channel, mask, S: tl.constexpr):
    """Keys at any places, one by one: fp32 `token` (within its tile), `channel` broadcast."""
    quad, half = channel // 4, token // LANES
    codes = pointer(row, 0, tl.int32)
    at = tile.to(tl.int64) * S.words
    low, high = words(codes, at, quad, half, token % LANES, mask, S)
    code = code_in(low, high, quad, half, channel % 4, S)
    scale, zero = affine(row, tile, head, token, channel, mask, mask, S, 0)
    return level_of(code, row, head, S, 0) * scale + zero


@triton.jit
def value_place(token, channel, S: tl.constexpr):
    """`(first word of the panel, quad, half)` of values; `token` within its tile."""
    panel = channel // 32
    quad, half = token // 4 + channel * 0, channel % 32 // LANES + token * 0
    if S.padded % 32 != 0:  # the last 16 channels have a panel of their own
        last = panel == S.padded // 32
        half = tl.where(last, quad % 2, half)
        quad = tl.where(last, quad // 2, quad)
    return panel * (TILE * S.bits), quad, half


@triton.jit
def value_number(row, head, tile, token, channel, mask, S: tl.constexpr):
    """Values at any places, one by one, as `key_number`."""
    start, quad, half = value_place(token, channel, S)
    codes = pointer(row, PART, tl.int32)
    at = tile.to(tl.int64) * S.words + start
    low, high = words(codes, at, quad, half, channel % LANES, mask, S)
    code = code_in(low, high, quad, half, token % 4, S)
    scale, zero = affine(row, tile, head, token, channel, mask, mask, S, 1)
    return level_of(code, row, head, S, 1) * scale + zero

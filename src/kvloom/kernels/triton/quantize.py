"""Pages on uniform grids: ranges, codes and packing in one launch, as `kvloom.formats._grid` defines them.

    asymmetric  scale = (max - zero) / (2^b - 1),  zero = min, rounded down in fp16
    symmetric   scale = max |x| / (2^(b-1) - 1)

Divisions are rounded as IEEE says and halves go to even, so that codes are those of torch, bit by bit. A
rotation (signs, then an orthonormal matrix) is in fp32, torch's in fp64: near the border of two codes
they may differ.

Codes of a page wait in a scratch, a byte each, which stays in the cache, until all are there and words
can be put together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.packing import word_of
from kvloom.kernels.triton.spec import PAGE, TILE, product

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no room for fractions


@triton.jit
def half_below(x):
    """The largest fp16 number that is not above `x`."""
    x = tl.clamp(x, -65504.0, 65504.0)
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True).to(tl.int32)  # sign and magnitude
    value = near.to(tl.float32)
    lower = tl.where(value > 0, bits - 1, tl.where(value < 0, bits + 1, -0x7FFF))
    below = lower.to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(value > x, below, near)


@triton.jit
def half_scale(span, STEPS: tl.constexpr):
    """fp16 scale of a range; never 0, never infinite."""
    scale = tl.div_rn(span, tl.full(span.shape, STEPS, tl.float32))
    return tl.clamp(scale, 1e-7, 65504.0).to(tl.float16)


@triton.jit
def range_of(x, some, AXIS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """`(scale, zero)` fp16 of the numbers in `some`, along an axis."""
    if SYMMETRIC:
        peak = tl.max(tl.where(some, tl.abs(x), 0.0), AXIS)
        scale = half_scale(peak, (1 << (BITS - 1)) - 1)
        return scale, scale
    else:
        zero = half_below(tl.min(tl.where(some, x, float("inf")), AXIS))
        span = tl.max(tl.where(some, x, float("-inf")), AXIS) - zero.to(tl.float32)
        return half_scale(span, (1 << BITS) - 1), zero


@triton.jit
def code_of(x, scale, zero, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Codes of numbers, int32; `scale`, `zero` broadcast."""
    scale = scale.to(tl.float32) + tl.full(x.shape, 0.0, tl.float32)
    if SYMMETRIC:
        x = tl.div_rn(x, scale)
        middle = 1 << (BITS - 1)
    else:
        x = tl.div_rn(x - zero.to(tl.float32), scale)
        middle = 0
    x = tl.clamp(x, -1024.0, 1024.0)
    code = (x + ROUND) - ROUND + middle
    return tl.clamp(code, 0.0, (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def by_token(
    x, token, channel, page, scale_at, zero_at,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Codes of a page, a scale for each token and `GROUP` channels; stores the parameters."""
    GROUPS: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    code = tl.full(x.shape, 0, tl.int32)
    n = tl.arange(0, PAGE)
    for g in tl.static_range(GROUPS):
        mine = (channel // GROUP == g) & (channel < WIDTH) & (token >= 0)
        scale, zero = range_of(x, mine, 1, BITS, SYMMETRIC)
        code = tl.where(mine, code_of(x, scale[:, None], zero[:, None], BITS, SYMMETRIC), code)
        at = ((page * 2 + n // TILE) * GROUPS + g) * TILE + n % TILE
        tl.store(scale_at + at, scale)
        if not SYMMETRIC:
            tl.store(zero_at + at, zero)
    return code


@triton.jit
def by_channel(
    x, token, channel, page, scale_at, zero_at,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Codes of a page, a scale for each channel and `GROUP` tokens; stores the parameters."""
    GROUPS: tl.constexpr = 64 // GROUP
    code = tl.full(x.shape, 0, tl.int32)
    inside = channel < WIDTH
    for g in tl.static_range(GROUPS):
        mine = (token // GROUP == g) & inside
        scale, zero = range_of(x, mine, 0, BITS, SYMMETRIC)
        code = tl.where(mine, code_of(x, scale[None, :], zero[None, :], BITS, SYMMETRIC), code)
        at = (page * GROUPS + g) * WIDTH + channel
        tl.store(scale_at + at, scale[None, :], mask=inside)
        if not SYMMETRIC:
            tl.store(zero_at + at, zero[None, :], mask=inside)
    return code


@triton.jit
def fetch(source, token, channel, mask, KEYS: tl.constexpr, S: tl.constexpr):
    """A code of the scratch; `source`: its address, and the first token."""
    at = (token + source[1]) * S.padded + channel
    return tl.load(source[0] + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def encode_page(
    x, page, codes, scale, zero, scratch,
    S: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A page `x [64, BLOCK]` fp32 to storage page `page` of its fields."""
    WIDTH: tl.constexpr = S.width
    GROUP: tl.constexpr = S.group
    BITS: tl.constexpr = S.bits
    SYMMETRIC: tl.constexpr = S.zero is None
    WORDS: tl.constexpr = S.words
    token, channel = tl.arange(0, PAGE)[:, None], tl.arange(0, BLOCK)[None, :]
    if S.per_token:
        code = by_token(x, token, channel, page, scale, zero, WIDTH, GROUP, BITS, SYMMETRIC)
    else:
        code = by_channel(x, token, channel, page, scale, zero, WIDTH, GROUP, BITS, SYMMETRIC)
    code = tl.where(channel < WIDTH, code, 0)
    tl.store(scratch + token * S.padded + channel, code.to(tl.uint8), mask=channel < S.padded)
    tl.debug_barrier()  # a word takes codes of several threads
    n = tl.arange(0, BLOCK * (2 if BITS == 2 else 4 if BITS < 8 else 8))
    for t in range(2):
        word = word_of(fetch, (scratch, t * TILE), n, n < WORDS, KEYS, S)
        tl.store(codes + (page * 2 + t) * WORDS + n, word, mask=n < WORDS)


@triton.jit
def rotated(x, signs, matrix, channel, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`(x * signs) @ matrix` of a page, `[64, BLOCK]` fp32; `x [64, 1]`: where its tokens lie. Part by part,
    since a matrix of 256 channels does not fit in shared memory.
    """
    v = tl.full((64, BLOCK), 0.0, tl.float32)
    for start in range(0, WIDTH, 16):
        i = start + tl.arange(0, 16)
        part = tl.load(x + i[None, :], mask=(i < WIDTH)[None, :], other=0.0).to(tl.float32)
        sign = tl.load(signs + i, mask=i < WIDTH, other=0).to(tl.float32)
        inside = (i < WIDTH)[:, None] & (channel < WIDTH)
        m = tl.load(matrix + i[:, None] * WIDTH + channel, mask=inside, other=0.0)
        v = product(part * sign[None, :], m, v)
    return v


@triton.jit
def encode_pages(
    x, codes, scale, zero, scratch, signs, heads_of, matrix,
    S: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pages `[N, 64, W]`; with `signs [H, W]` and `matrix`, those of heads `heads_of [N]` are
    rotated first. Program: page.
    """
    WIDTH: tl.constexpr = S.width
    page = tl.program_id(0).to(tl.int64)
    token, channel = tl.arange(0, PAGE)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (channel < WIDTH) & (token >= 0)
    here = x + (page * PAGE + token) * WIDTH
    if signs is not None:
        mine = signs + tl.load(heads_of + page) * WIDTH
        v = rotated(here, mine, matrix, channel, WIDTH, BLOCK)
    else:
        v = tl.load(here + channel, mask=inside, other=0.0).to(tl.float32)
    own = scratch + page * (PAGE * S.padded)
    encode_page(v, page, codes, scale, zero, own, S, KEYS, BLOCK)

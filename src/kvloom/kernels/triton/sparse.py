"""What outliers and planes change: numbers that replace those of codes.

A number that differs by d changes a logit by q_c d and an output by p d, so that codes are multiplied as
if there were none, and the differences are added behind them; d needs the code once more, one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.codes import key_number, value_number
from kvloom.kernels.triton.keys import positions_of, rotation
from kvloom.kernels.triton.spec import (
    NUMBERS,
    PART,
    PLACES,
    PLANE,
    PLANE_IDS,
    PLANE_INDEX,
    PLANE_SCALE,
    TILE,
    pointer,
    product,
    small,
)


@triton.jit
def query_at(query, rows, exists, channel, position, frequencies, R: tl.constexpr):
    """What a key's `channel [N]` at `position [N]` is multiplied with: fp32 `[M, N]`, turned back if
    keys are held before rotation.
    """
    q = tl.load(query + rows[:, None] + channel[None, :], mask=exists[:, None], other=0.0)
    if R is not None:
        partner, cosine, sine = rotation(channel, position, frequencies, R)
        at = query + rows[:, None] + partner[None, :]
        other = tl.load(at, mask=exists[:, None], other=0.0).to(tl.float32)
        q = q.to(tl.float32) * cosine[None, :] - other * sine[None, :]
    return q.to(tl.float32)


@triton.jit
def plane_of(row, head, tile, token, exists, J: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """`(channel, number, here)` of the J-th channel in the planes of tokens' tiles, and whether there is
    such a channel.
    """
    index = pointer(row, P * PART + PLANE_INDEX, tl.int32)
    held = tl.load(index + tile, mask=exists, other=-1)
    here = held >= 0
    held = tl.maximum(held, 0).to(tl.int64)
    WIDE: tl.constexpr = S.wide_ids
    DTYPE: tl.constexpr = S.plane_dtype
    ids = small(row, P * PART + PLANE_IDS, WIDE)
    channel = tl.load(ids + held * S.plane + J, mask=here, other=0).to(tl.int32)
    if J > 0:  # where there are fewer channels the first is repeated
        here = here & (channel != tl.load(ids + held * S.plane, mask=here, other=0).to(tl.int32))
    numbers = pointer(row, P * PART + PLANE, DTYPE)
    at = (held * TILE + token) * S.plane + J
    number = tl.load(numbers + at, mask=here, other=0.0).to(tl.float32)
    if S.plane_scaled:
        scale = pointer(row, P * PART + PLANE_SCALE, tl.float16)
        number *= tl.load(scale + held * S.plane + J, mask=here, other=0.0).to(tl.float32)
    return channel, number, here


@triton.jit
def add_key_planes(
    s, query, rows, exists, row, head, cell, frequencies, tile0, slot0, tiles,
    S: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, N)
    there, tile, token = n // TILE < tiles, tile0 + n // TILE, n % TILE
    position = n
    if R is not None:
        position = positions_of(row, cell, slot0 + n, there)
    COUNT: tl.constexpr = S.plane
    for j in tl.static_range(COUNT):
        channel, number, here = plane_of(row, head, tile, token, there, j, S, 0)
        change = number - key_number(row, head, tile, token, channel, here, S)
        q = query_at(query, rows, exists, channel, position, frequencies, R)
        s += q * tl.where(here, change, 0.0)[None, :]
    return s


@triton.jit
def add_key_outliers(
    s, query, rows, exists, row, head, cell, frequencies, tile0, slot0, tiles,
    S: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Those of one tile after the other, summed up by token as a product with ones and zeros."""
    j, n = tl.arange(0, S.outlier_block), tl.arange(0, N)
    HELD: tl.constexpr = S.outlier_dtype
    WIDE: tl.constexpr = S.wide_places
    numbers, places = pointer(row, NUMBERS, HELD), small(row, PLACES, WIDE)
    for t in tl.static_range(N // TILE):
        here = (j < S.outliers) & (t < tiles)
        at = (tile0 + t).to(tl.int64) * S.outliers + j
        place = tl.load(places + at, mask=here, other=0).to(tl.int32)
        token, channel = place // S.width, place % S.width
        number = tl.load(numbers + at, mask=here, other=0.0).to(tl.float32)
        change = number - key_number(row, head, tile0 + t + j * 0, token, channel, here, S)
        position = token
        if R is not None:
            position = positions_of(row, cell, slot0 + t * TILE + token, here)
        q = query_at(query, rows, exists, channel, position, frequencies, R)
        q *= tl.where(here, change, 0.0)[None, :]
        at_token = (n[None, :] == (token + t * TILE)[:, None]).to(tl.float32)
        s = tl.dot(q, at_token, s, input_precision=PRECISION)
    return s


@triton.jit
def add_change(acc, p, channel, change, columns, DTYPE: tl.constexpr):
    """Adds `p [M, N]` times `change [N]` to the columns that stand for `channel [N]`."""
    where = (channel[:, None] == columns[None, :]).to(tl.float32).to(DTYPE)
    changed = (p * change[None, :]).to(DTYPE)
    return product(changed, where, acc)


@triton.jit
def add_value_planes(
    acc0, acc1, p, columns0, columns1, row, head, tile0, tiles,
    S: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, N)
    there, tile, token = n // TILE < tiles, tile0 + n // TILE, n % TILE
    COUNT: tl.constexpr = S.plane
    for j in tl.static_range(COUNT):
        channel, number, here = plane_of(row, head, tile, token, there, j, S, 1)
        change = number - value_number(row, head, tile, token, channel, here, S)
        change = tl.where(here, change, 0.0)
        acc0 = add_change(acc0, p, channel, change, columns0, DTYPE)
        acc1 = add_change(acc1, p, channel, change, columns1, DTYPE)
    return acc0, acc1


@triton.jit
def add_value_outliers(
    acc0, acc1, p, columns0, columns1, row, head, tile0, tiles,
    S: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, N)
    there, tile, token = n // TILE < tiles, tile0 + n // TILE, n % TILE
    HELD: tl.constexpr = S.outlier_dtype
    WIDE: tl.constexpr = S.wide_places
    numbers, places = pointer(row, PART + NUMBERS, HELD), small(row, PART + PLACES, WIDE)
    COUNT: tl.constexpr = S.outliers
    for j in tl.static_range(COUNT):
        at = (tile0.to(tl.int64) * TILE + n) * S.outliers + j
        channel = tl.load(places + at, mask=there, other=0).to(tl.int32)
        number = tl.load(numbers + at, mask=there, other=0.0).to(tl.float32)
        change = number - value_number(row, head, tile, token, channel, there, S)
        change = tl.where(there, change, 0.0)
        acc0 = add_change(acc0, p, channel, change, columns0, DTYPE)
        acc1 = add_change(acc1, p, channel, change, columns1, DTYPE)
    return acc0, acc1

"""Pages decoded into a workspace, for queries that are many: plain matrix products follow."""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.codes import halved, key_number, value_number
from kvloom.kernels.triton.sparse import plane_of
from kvloom.kernels.triton.spec import (
    FIRST,
    NUMBERS,
    PAGE,
    PART,
    PLACES,
    ROW,
    TILE,
    USED,
    pointer,
    small,
)


@triton.jit
def put_outliers(row, page, out, exists, S: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """Exact numbers over those of codes: of tiles for keys, of tokens for values."""
    HELD: tl.constexpr = S.outlier_dtype
    WIDE: tl.constexpr = S.wide_places
    numbers = pointer(row, P * PART + NUMBERS, HELD)
    places = small(row, P * PART + PLACES, WIDE)
    j = tl.arange(0, S.outlier_block)
    if P == 0:
        for t in tl.static_range(2):
            here = (j < S.outliers) & exists
            at = (page * 2 + t).to(tl.int64) * S.outliers + j
            place = tl.load(places + at, mask=here, other=0).to(tl.int32)
            x = tl.load(numbers + at, mask=here, other=0.0).to(tl.float32)
            tl.store(out + t * TILE * S.width + place, halved(x, DTYPE), mask=here)
    else:
        token = tl.arange(0, PAGE)[:, None]
        here = (j < S.outliers)[None, :] & (token >= 0) & exists
        at = (page.to(tl.int64) * PAGE + token) * S.outliers + j[None, :]
        place = tl.load(places + at, mask=here, other=0).to(tl.int32)
        x = tl.load(numbers + at, mask=here, other=0.0).to(tl.float32)
        tl.store(out + token * S.width + place, halved(x, DTYPE), mask=here)


@triton.jit
def decode_part(
    row, head, page, exists, out, S: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr
):
    """One page of keys (`P` 0) or values (1) to `out [64, width]`; zeros if there is no such page."""
    token, channel = tl.arange(0, PAGE)[:, None], tl.arange(0, S.block)[None, :]
    inside = (channel < S.width) & (token >= 0)
    here = inside & exists
    if S.packed:
        tile = page * (PAGE // TILE) + token // TILE + channel * 0
        if P == 0:
            x = key_number(row, head, tile, token % TILE, channel, here, S)
        else:
            x = value_number(row, head, tile, token % TILE, channel, here, S)
        x = halved(x, DTYPE)
    else:
        held = pointer(row, P * PART, DTYPE) + page.to(tl.int64) * (PAGE * S.width)
        x = tl.load(held + token * S.width + channel, mask=here, other=0.0)
    tl.store(out + token * S.width + channel, x, mask=inside)
    if S.outliers > 0 or S.plane > 0:
        tl.debug_barrier()  # what follows overwrites numbers that other threads have stored
    if S.outliers > 0:
        put_outliers(row, page, out, exists, S, P, DTYPE)
    if S.plane > 0:
        if S.outliers > 0:
            tl.debug_barrier()
        n = tl.arange(0, PAGE)
        COUNT: tl.constexpr = S.plane
        for j in tl.static_range(COUNT):
            at = page * (PAGE // TILE) + n // TILE
            of, x, some = plane_of(row, head, at, n % TILE, (n >= 0) & exists, j, S, P)
            tl.store(out + n * S.width + of, halved(x, DTYPE), mask=some)


@triton.jit(do_not_specialize=["slab", "pages"])
def decode_pages(
    table, cells, keys, values, slab, pages, cells_n, heads,
    K: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A slab to `[cells, pages * 64, width]`; program: (cell, page)."""
    cell, page = tl.program_id(0), tl.program_id(1)
    row, mine = table + slab * ROW, cells + (slab * cells_n + cell) * 3
    exists = page < tl.load(mine + USED)
    stored = tl.load(mine + FIRST) + page
    at = (cell.to(tl.int64) * pages + page) * PAGE
    decode_part(row, cell % heads, stored, exists, keys + at * K.width, K, 0, DTYPE)
    decode_part(row, cell % heads, stored, exists, values + at * V.width, V, 1, DTYPE)

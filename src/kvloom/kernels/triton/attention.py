"""Attention of few queries over pages and over exact entries, split over the context (flash-decoding).

A program takes the queries of one (row, KV head), all query heads of its group at once, and a run of pages
or of exact entries; it leaves `out [M, E]`, normalised within the run, and its log-sum-exp. `combine`
adds those of all runs. How many entries there are is read on the device: runs behind the end are empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.keys import dense_logits, load_queries, packed_logits, positions_of
from kvloom.kernels.triton.sparse import (
    add_key_outliers,
    add_key_planes,
    add_value_outliers,
    add_value_planes,
)
from kvloom.kernels.triton.spec import (
    ALIVE,
    ALIVE_SLOTS,
    CODES,
    FIRST,
    MASS,
    MASS_SLOTS,
    PAGE,
    PART,
    ROW,
    SKIP,
    TILE,
    USED,
    pointer,
)
from kvloom.kernels.triton.values import add_dense, add_packed, channels_of

EMPTY = tl.constexpr(float("-inf"))


@triton.jit
def capped(s, scale, softcap, CAPPED: tl.constexpr):
    """Scale, then softcap: `softcap tanh(s / softcap)`."""
    s = s * scale
    if CAPPED:
        s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))
    return s


@triton.jit
def weigh(s, top, total):
    """One step of an online softmax over `s [M, N]`: `(weights, decay of the past, top, total)`."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == EMPTY, 0.0, new)
    p = tl.exp(s - safe[:, None])
    decay = tl.exp(top - safe)
    return p, decay, new, total * decay + tl.sum(p, 1)


@triton.jit
def finish(out, lse, at, rows, M_ROWS, acc0, acc1, top, total, S: tl.constexpr):
    """Stores a run's result, of which `at` says which it is."""
    inside = rows < M_ROWS
    seen = tl.where(total == 0.0, 1.0, total)
    norm = 1.0 / seen
    here = tl.full((), at, tl.int64) * M_ROWS + rows
    tl.store(lse + here, tl.where(total == 0.0, EMPTY, top + tl.log(seen)), mask=inside)
    for half in tl.static_range(2):
        channel = channels_of(half, S)
        acc = acc0 if half == 0 else acc1
        mask = inside[:, None] & (channel < S.width)[None, :]
        tl.store(out + here[:, None] * S.width + channel[None, :], acc * norm[:, None], mask=mask)


@triton.jit
def page_logits(
    q, query, rows, exists, row, head, cell, frequencies, tile0, slot0, tiles,
    K: tl.constexpr, R: tl.constexpr, M: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`[M, T * 32]`, without scale."""
    N: tl.constexpr = T * TILE
    if K.packed:
        s = packed_logits(q, row, head, cell, frequencies, tile0, slot0, tiles, K, R, M, T, DTYPE)
        if K.plane > 0:
            s = add_key_planes(
                s, query, rows, exists, row, head, cell, frequencies, tile0, slot0, tiles, K, R, N
            )
        if K.outliers > 0:
            s = add_key_outliers(
                s, query, rows, exists, row, head, cell, frequencies, tile0, slot0, tiles, K, R, N,
                PRECISION,
            )  # fmt: skip
        return s
    else:
        n = tl.arange(0, N)
        there = n // TILE < tiles
        position = n
        if R is not None:
            position = positions_of(row, cell, slot0 + n, there)
        token = tile0.to(tl.int64) * TILE + n
        keys = pointer(row, CODES, DTYPE)
        STRIDE: tl.constexpr = K.width
        return dense_logits(q, keys, STRIDE, token, there, position, frequencies, K, R, M, N, DTYPE)


@triton.jit
def slot_bias(s, row, cell, slot0, slots, skip, N: tl.constexpr):
    """Logits plus log masses; -inf where there is no live entry."""
    slot = slot0 + tl.arange(0, N)
    there = (slot < slots) & (slot >= skip)
    if tl.load(row + MASS) != 0:
        mass = pointer(row, MASS, tl.float32) + cell * tl.load(row + MASS_SLOTS)
        s += tl.load(mass + slot, mask=there, other=0.0)[None, :]
    if tl.load(row + ALIVE) != 0:
        alive = pointer(row, ALIVE, tl.int8) + cell * tl.load(row + ALIVE_SLOTS)
        there = there & (tl.load(alive + slot, mask=there, other=0) != 0)
    return tl.where(there[None, :], s, EMPTY)


@triton.jit
def add_values(
    acc0, acc1, p, row, head, tile0, tiles,
    V: tl.constexpr, M: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = T * TILE
    if V.packed:
        acc0, acc1 = add_packed(acc0, acc1, p, row, head, tile0, tiles, V, M, T, DTYPE)
        zero, one = channels_of(0, V), channels_of(1, V)
        if V.plane > 0:
            acc0, acc1 = add_value_planes(
                acc0, acc1, p, zero, one, row, head, tile0, tiles, V, N, DTYPE
            )
        if V.outliers > 0:
            acc0, acc1 = add_value_outliers(
                acc0, acc1, p, zero, one, row, head, tile0, tiles, V, N, DTYPE
            )
        return acc0, acc1
    else:
        n = tl.arange(0, N)
        token, there = tile0.to(tl.int64) * TILE + n, n // TILE < tiles
        values = pointer(row, PART + CODES, DTYPE)
        STRIDE: tl.constexpr = V.width
        return add_dense(acc0, acc1, p, values, STRIDE, token, there, V, DTYPE)


@triton.jit(do_not_specialize=["M_ROWS", "cells_n"])
def attend_pages(
    query, table, cells, splits, frequencies, out, lse, M_ROWS, cells_n, heads, scale, softcap,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, M: tl.constexpr, PAGES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Queries `[cells, M_ROWS, D]`; `splits [S, 4]`: slab, first and last page of each run, slots of the
    slabs before; `cells` `[slabs, cells, 3]`; program `(cell and block of M rows, run)`.
    """
    T: tl.constexpr = PAGES * (PAGE // TILE)
    cell, part = tl.program_id(0) % cells_n, tl.program_id(0) // cells_n
    run, head = tl.program_id(1), cell % heads
    split = splits + run * 4
    slab = tl.load(split)
    row, mine = table + slab * ROW, cells + (slab * cells_n + cell) * 3
    first, used, skip = tl.load(mine + FIRST), tl.load(mine + USED), tl.load(mine + SKIP)
    stop = tl.minimum(tl.load(split + 2), used)
    rows = part * M + tl.arange(0, M)
    exists = rows < M_ROWS
    at = (cell * M_ROWS + rows) * K.width
    q = load_queries(query, at, exists, K, DTYPE)
    acc0, acc1 = tl.full((M, V.columns), 0.0, tl.float32), tl.full((M, V.columns), 0.0, tl.float32)
    top, total = tl.full((M,), EMPTY, tl.float32), tl.full((M,), 0.0, tl.float32)
    for page in range(tl.maximum(tl.load(split + 1), skip // PAGE), stop, PAGES):
        tile0, slot0 = (first + page) * (PAGE // TILE), page * PAGE
        tiles = (stop - page) * (PAGE // TILE)
        s = page_logits(
            q, query, at, exists, row, head, cell, frequencies, tile0, slot0, tiles,
            K, R, M, T, DTYPE, PRECISION,
        )  # fmt: skip
        s = capped(s, scale, softcap, CAPPED)
        s = slot_bias(s, row, cell, slot0, stop * PAGE, skip, T * TILE)
        p, decay, top, total = weigh(s, top, total)
        acc0, acc1 = add_values(
            acc0 * decay[:, None], acc1 * decay[:, None], p, row, head, tile0, tiles, V, M, T, DTYPE
        )
    finish(out, lse, run * cells_n + cell, rows, M_ROWS, acc0, acc1, top, total, V)


@triton.jit
def attend_run(
    tier, start, stop, cell, heads, rows, M_ROWS, scale, softcap,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Exact entries `start .. stop` of one (row, head): `(acc0, acc1, top, total)`."""
    query, bias, count, strides = tier[0], tier[3], tier[4], tier[5]
    b, head = (cell // heads).to(tl.int64), (cell % heads).to(tl.int64)
    keys = tier[1] + b * strides[0] + head * strides[1]
    values = tier[2] + b * strides[3] + head * strides[4]
    if count is not None:
        stop = tl.minimum(stop, tl.load(count + cell))
    q = load_queries(query, (cell * M_ROWS + rows) * K.width, rows < M_ROWS, K, DTYPE)
    acc0, acc1 = tl.full((M, V.columns), 0.0, tl.float32), tl.full((M, V.columns), 0.0, tl.float32)
    top, total = tl.full((M,), EMPTY, tl.float32), tl.full((M,), 0.0, tl.float32)
    for i in range(start, stop, N):
        token = i + tl.arange(0, N)
        exists = token < stop
        s = dense_logits(q, keys, strides[2], token, exists, token, query, K, None, M, N, DTYPE)
        s = capped(s, scale, softcap, CAPPED)
        if bias is not None:
            s += tl.load(bias + cell * strides[6] + token, mask=exists, other=0.0)[None, :]
        s = tl.where(exists[None, :], s, EMPTY)
        p, decay, top, total = weigh(s, top, total)
        acc0, acc1 = add_dense(
            acc0 * decay[:, None],
            acc1 * decay[:, None],
            p,
            values,
            strides[5],
            token,
            exists,
            V,
            DTYPE,
        )
    return acc0, acc1, top, total


@triton.jit(do_not_specialize=["tail_stop", "sinks_stop", "first_run", "M_ROWS", "cells_n", "runs"])
def attend_exact(
    tail, sinks, tail_stop, sinks_stop, out, lse, first_run, runs, M_ROWS, cells_n, heads, scale, softcap,
    K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EACH: tl.constexpr,
    DTYPE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Tail and sinks in one launch: the first `runs` programs take `EACH` entries of the tail each, the
    others of the sinks. `tail` and `sinks`: `(query, keys, values, bias, count, strides)`; there are as
    many entries as `count` says on the device, and at most `tail_stop`, `sinks_stop`.
    """
    cell, part = tl.program_id(0) % cells_n, tl.program_id(0) // cells_n
    run = tl.program_id(1)
    rows = part * M + tl.arange(0, M)
    if run < runs:
        start, stop = run * EACH, tl.minimum((run + 1) * EACH, tail_stop)
        acc0, acc1, top, total = attend_run(
            tail, start, stop, cell, heads, rows, M_ROWS, scale, softcap, K, V, M, N, DTYPE, CAPPED
        )
    else:
        start, stop = (run - runs) * EACH, tl.minimum((run - runs + 1) * EACH, sinks_stop)
        acc0, acc1, top, total = attend_run(
            sinks, start, stop, cell, heads, rows, M_ROWS, scale, softcap, K, V, M, N, DTYPE, CAPPED
        )
    at = (first_run + run) * cells_n + cell
    finish(out, lse, at, rows, M_ROWS, acc0, acc1, top, total, V)


@triton.jit(do_not_specialize=["runs", "rows_n"])
def combine(
    outs, lses, out, lse, runs, rows_n, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr
):
    """Runs' results `[runs, rows, E]` as one, exactly, `RUNS` of them at a time; program: row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    top, total = tl.full((), EMPTY, tl.float32), tl.full((), 0.0, tl.float32)
    acc = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, runs, RUNS):
        run = start + tl.arange(0, RUNS)
        at = run.to(tl.int64) * rows_n + row
        some = tl.load(lses + at, mask=run < runs, other=EMPTY)
        new = tl.maximum(top, tl.max(some, 0))
        safe = tl.where(new == EMPTY, 0.0, new)
        decay, weight = tl.exp(top - safe), tl.exp(some - safe)
        inside = (run < runs)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(outs + at[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
        acc = acc * decay + tl.sum(x * weight[:, None], 0)
        total = total * decay + tl.sum(weight, 0)
        top = new
    seen = tl.where(total == 0.0, 1.0, total)
    norm = 1.0 / seen
    tl.store(out + row * WIDTH + column, acc * norm, mask=column < WIDTH)
    tl.store(lse + row, tl.where(total == 0.0, EMPTY, top + tl.log(seen)))


@triton.jit(do_not_specialize=["M_ROWS", "cells_n", "slots_n"])
def mass_of_pages(
    query, table, cells, splits, frequencies, norm, received, M_ROWS, cells_n, slots_n, heads, scale,
    softcap, K: tl.constexpr, R: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, PAGES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attention that slots of pages receive, `received [cells, slots_n]`, which is 0 before: summed over
    the queries, `PARTS` blocks of M, whose normalisers over all tiers are `norm [cells, M_ROWS]` (+inf: it
    does not vote). Program: (cell, run) as in `attend_pages`.
    """
    N: tl.constexpr = PAGES * PAGE
    T: tl.constexpr = PAGES * (PAGE // TILE)
    cell, split = tl.program_id(0), splits + tl.program_id(1) * 4
    head, slab = cell % heads, tl.load(split)
    row, mine = table + slab * ROW, cells + (slab * cells_n + cell) * 3
    first, used, skip = tl.load(mine + FIRST), tl.load(mine + USED), tl.load(mine + SKIP)
    stop = tl.minimum(tl.load(split + 2), used)
    mass = received + cell.to(tl.int64) * slots_n + tl.load(split + 3)
    rows = tl.arange(0, M)
    q = load_queries(query, (cell * M_ROWS + rows) * K.width, rows < M_ROWS, K, DTYPE)
    for page in range(tl.maximum(tl.load(split + 1), skip // PAGE), stop, PAGES):
        tile0, slot0 = (first + page) * (PAGE // TILE), page * PAGE
        tiles = (stop - page) * (PAGE // TILE)
        total = tl.full((N,), 0.0, tl.float32)
        for part in tl.static_range(PARTS):
            rows = part * M + tl.arange(0, M)
            exists = rows < M_ROWS
            at = (cell * M_ROWS + rows) * K.width
            if PARTS > 1:
                q = load_queries(query, at, exists, K, DTYPE)
            s = page_logits(
                q, query, at, exists, row, head, cell, frequencies, tile0, slot0, tiles,
                K, R, M, T, DTYPE, PRECISION,
            )  # fmt: skip
            s = capped(s, scale, softcap, CAPPED)
            s = slot_bias(s, row, cell, slot0, stop * PAGE, skip, N)
            one = tl.load(norm + cell * M_ROWS + rows, mask=exists, other=float("inf"))
            total += tl.sum(tl.exp(s - one[:, None]), 0)
        slot = slot0 + tl.arange(0, N)
        tl.store(mass + slot, total, mask=slot < stop * PAGE)

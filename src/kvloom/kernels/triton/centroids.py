"""Tokens that join centroids: `kvloom.kernels.reference.join_centroids` in one launch.

A program takes one token and writes what becomes of the centroid that it is near, once for every token
near it and always with the same result: sums have a fixed order, and no two programs write one place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def join_centroids(
    slots, at, rows, mass, out, tokens, stride, log_ema,
    COLUMNS: tl.constexpr, EMA: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`slots [N, stride]`, `rows [cells, tokens, stride]`, `at`, `mass [cells, tokens]` to
    `out [cells, tokens, COLUMNS + 1]`. Program: (token of a cell, block of columns).
    """
    token = tl.program_id(0).to(tl.int64)
    first = token // tokens * tokens
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < COLUMNS
    centroid = tl.load(at + token)
    j = tl.arange(0, TOKENS)
    near = tl.load(at + first + j, mask=j < tokens, other=-1) == centroid
    joined = tl.sum(tl.load(mass + first + j, mask=near & (j < tokens), other=0.0), 0)
    total = tl.load(slots + centroid * stride + COLUMNS) + joined
    old = tl.load(slots + centroid * stride + column, mask=here, other=0.0)
    new, after = old, joined * 0.0
    for i in range(0, tokens):  # the newest first
        other = first + tokens - 1 - i
        weight = tl.where(tl.load(at + other) == centroid, tl.load(mass + other), 0.0)
        if EMA:
            share = (1.0 - tl.exp(weight * log_ema)) * tl.exp(after * log_ema)
            after += weight
        else:
            share = weight / tl.maximum(total, 1e-30)
        if weight > 0.0:
            x = tl.load(rows + other * stride + column, mask=here, other=0.0)
            new += share * (x - old)
    made = out + token * (COLUMNS + 1)
    tl.store(made + column, new, mask=here)
    tl.store(made + COLUMNS, total, mask=tl.program_id(1) == 0)

"""Appending one token to every (row, head), behind as many as the device has counted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots"])
def append_token(
    key, value, keys, values, count, slots,
    D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """`key [cells, D]`, `value [cells, E]` to slot `count[cell]` of `keys`, `values [cells, slots, ..]`,
    which is counted. A full run takes no more: the token is lost, and whoever launches must not let it
    come to that. A `RING` begins again at slot 0, and goes on counting. Program: cell.
    """
    cell, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = tl.load(count + cell)
    fits = RING or at < slots
    where = cell * slots + (at % slots if RING else at)
    x = tl.load(key + cell * D + column, mask=column < D, other=0.0)
    tl.store(keys + where * D + column, x, mask=(column < D) & fits)
    y = tl.load(value + cell * E + column, mask=column < E, other=0.0)
    tl.store(values + where * E + column, y, mask=(column < E) & fits)
    tl.debug_barrier()  # all threads have read the count
    tl.store(count + cell, at + 1 if RING else tl.minimum(at + 1, slots))

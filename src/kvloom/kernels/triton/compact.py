"""Compaction of packed codes: slots move to other tiles and keep their codes; nothing is encoded again."""

from __future__ import annotations

import triton
import triton.language as tl

from kvloom.kernels.triton.codes import value_place, vector_of
from kvloom.kernels.triton.packing import word_of
from kvloom.kernels.triton.spec import LANES, TILE


@triton.jit
def moved(source, token, channel, mask, KEYS: tl.constexpr, S: tl.constexpr):
    """The code that belongs to a token of the new tile: `source` is (addresses of slabs, slab and slot
    of every new slot, first slot of the tile).
    """
    table, slabs, slots, first = source[0], source[1], source[2], source[3]
    slab = tl.load(slabs + first + token, mask=mask, other=-1)
    slot = tl.load(slots + first + token, mask=mask, other=0)
    here = mask & (slab >= 0)
    codes = tl.load(table + slab, mask=here, other=0).to(tl.pointer_type(tl.int32))
    t = slot % TILE
    if KEYS:
        start, quad, half, lane, e = t * 0, channel // 4, t // LANES, t % LANES, channel % 4
    else:
        start, quad, half = value_place(t, channel, S)
        lane, e = channel % LANES, t % 4
    at = (slot // TILE).to(tl.int64) * S.words + start
    low = tl.load(codes + at + vector_of(quad, half, S) * LANES + lane, mask=here, other=0)
    if S.bits == 8:
        return (low >> (8 * e)) & 255
    elif S.bits == 4:
        return (low >> (8 * e + 4 * half)) & 15
    else:
        code = (low >> (8 * e + 2 * half + 4 * (quad % 2))) & 3
        if S.bits == 3:
            high = at + (quad // 4 * 3 + 2) * LANES + lane
            top = tl.load(codes + high, mask=here, other=0)
            code += 4 * ((top >> (8 * e + quad % 2 + quad % 4 // 2 * 4 + 2 * half)) & 1)
        return code


@triton.jit
def move_codes(table, slabs, slots, out, S: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """New tiles `out [N, words]` from the slots of slabs at `table`; `slabs`, `slots [N * 32]` say which
    slot of which slab each new one is, slab -1: none (its codes are 0). Program: tile.
    """
    tile = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    word = word_of(moved, (table, slabs, slots, tile * TILE), n, n < S.words, KEYS, S)
    tl.store(out + tile * S.words + n, word, mask=n < S.words)

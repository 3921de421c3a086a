"""What a kernel must know when it is compiled: how keys, or values, of a format lie in pages.

A layer's slabs are handed over as a table of addresses, a row of `ROW` int64 for each slab, so that one
launch reads all of them, and a captured graph need not be captured again when pages are added.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import triton
import triton.language as tl

# columns of a part's addresses; those of values come `PART` later
CODES, SCALE, SCALE_INDEX, ZERO, ZERO_INDEX, LEVELS = (tl.constexpr(i) for i in range(6))
NUMBERS, PLACES, PLANE, PLANE_IDS, PLANE_SCALE, PLANE_INDEX = (
    tl.constexpr(i) for i in range(6, 12)
)
PART = tl.constexpr(12)
# of a slab: live flags, log masses, positions, each with the slots of one (row, head)
ALIVE, ALIVE_SLOTS, MASS, MASS_SLOTS, POSITIONS, POSITION_SLOTS = (
    tl.constexpr(i) for i in range(24, 30)
)
ROW = tl.constexpr(30)
# columns of a slab's cells: first page, pages in use, dead slots at the front
FIRST, USED, SKIP = (tl.constexpr(i) for i in range(3))

# the interpreter multiplies bf16 as if it were whole numbers
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
TILE, PAGE, LANES = tl.constexpr(32), tl.constexpr(64), tl.constexpr(16)


@dataclass(frozen=True)
class Home:
    """fp16 parameters: `where` is `"tile"`, `"table"` or `"set"`; `stride`: numbers of each."""

    where: str
    stride: int


@dataclass(frozen=True)
class Spec:
    """One part of a format (see `kvloom.kernels.packed.PackedPart`), for the compiler.

    Attributes:
        kind: `"dense"`, `"uniform"`, `"levels"` or `"fp8"`. width, padded: channels, stored ones.
        words: int32 words of a tile. group: channels that share a scale, 0: each has its own (per
            channel) or all share one (per token). levels: numbers of a head's table, 0: one for all.
        outliers: of a vector (a tile of keys, a token's values). plane: channels of a plane.
    """

    kind: str
    width: int
    padded: int
    bits: int = 16
    words: int = 0
    per_token: bool = True
    group: int = 0
    middle: float = 0.0
    scale: Home | None = None
    zero: Home | None = None
    levels: int = 0
    outliers: int = 0
    outlier_dtype: tl.dtype = tl.float16
    wide_places: bool = False
    plane: int = 0
    plane_dtype: tl.dtype = tl.float16
    plane_scaled: bool = False
    wide_ids: bool = False

    @property
    def packed(self) -> bool:
        return self.kind != "dense"

    @property
    def folded(self) -> bool:
        """Whether a token has one scale, which then meets logits and weights instead of numbers."""
        return self.packed and self.per_token and (self.group == 0 or self.group >= self.width)

    @property
    def centre(self) -> float:
        """What is taken off the codes of values before they meet rounded weights, and put back exactly:
        all codes of a grid from its minimum have one sign, and what weights lose would add up, in a
        rotated basis in a single channel.
        """
        whole = self.folded and self.kind == "uniform" and self.zero is not None
        return ((1 << self.bits) - 1) / 2 if whole else 0.0

    @property
    def quads(self) -> int:
        """Rows of a block of keys of one e: quads of channels, as matrix products want them."""
        return max(16, power(self.padded // 4))

    @property
    def outlier_block(self) -> int:
        """Outliers of a tile of keys, as matrix products want them."""
        return max(16, power(self.outliers))

    @property
    def columns(self) -> int:
        """Channels of each of the two accumulators of values: those of one half, or half of all."""
        return max(16, power(-(-self.padded // 32)) * 16)

    @property
    def panels(self) -> int:
        return self.columns // 16

    @property
    def block(self) -> int:
        """Channels of a block of dense entries."""
        return 2 * self.columns


@dataclass(frozen=True)
class Rope:
    """The rotation of keys that pages hold before it."""

    rotated: int
    interleaved: bool
    scale: float


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@triton.jit
def pointer(row, column, DTYPE: tl.constexpr):
    """The address in a column of a slab's row; what it points at is aligned to 16 bytes."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def small(row, column, WIDE: tl.constexpr):
    """The address of small whole numbers: int16 if `WIDE`, else uint8."""
    if WIDE:
        return pointer(row, column, tl.int16)
    else:
        return pointer(row, column, tl.uint8)


@triton.jit
def product(a, b, acc):
    """`acc + a @ b` in fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")

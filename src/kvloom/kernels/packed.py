"""How a format's pages lie in memory, as far as a kernel must know to attend without decoding them.

    number = level(code) * scale + zero

then some numbers are replaced by exact ones. `None` in place of a `PackedPart` means that keys, or
values, are stored as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """fp16 numbers of a tile's channels or tokens.

    Attributes:
        name: of the field. home: `"tile"`: it lies with the tile, `"table"`: it is one for each head
            of the layer; else the family of sets.
    """

    name: str
    home: str = "tile"


@dataclass(frozen=True)
class PackedPart:
    """Packed keys or values (see `kvloom.kernels.layout`).

    Attributes:
        kind: `"uniform"`: the level of a code is the code, `"levels"`: a table says, `"fp8"`: e4m3.
        bits, width: of a code, and of a head.
        per: `"token"` or `"channel"`: what has a scale of its own.
        group: channels that share a scale (per token: 0 for all; they lie as planes `[groups, 32]`).
        codes: field of tiles.
        zero: None: code `middle` stands for 0.
        levels: the table, fp32 `[2^bits]`, or the name of one for each head, `[H, 2^bits]`.
        outliers: fields of places and exact numbers: of tiles for keys, of slots for values.
        plane: family of sets that hold whole channels, and the prefix of its fields.
    """

    kind: Literal["uniform", "levels", "fp8"]
    bits: int
    width: int
    per: str
    codes: str
    scale: Parameter
    zero: Parameter | None = None
    group: int = 0
    middle: float = 0.0
    levels: Tensor | str | None = None
    outliers: tuple[str, str] | None = None
    plane: tuple[str, str] | None = None


Parts = tuple[PackedPart | None, PackedPart | None]  # of keys and of values

"""Integer codes of 4 bits, per token unless said otherwise.

    asymmetric  x ~ code * scale + zero,    zero = min,  scale = (max - min) / 15
    symmetric   x ~ (code - 8) * scale,     scale = max |x| / 7

A scale and a zero for each token and head are FlexGen's scheme (arXiv:2303.06865) with groups as wide
as a head: 4.25 bits at head_dim 128, 4.5 at 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvloom.formats._uniform import Uniform


@dataclass(frozen=True)
class Int4(Uniform):
    __doc__ = (Uniform.__doc__ or "").replace("Integer codes", "4-bit codes", 1)

    bits: ClassVar[int] = 4

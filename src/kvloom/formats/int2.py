"""Integer codes of 2 bits, per token unless said otherwise.

    asymmetric  x ~ code * scale + zero,    zero = min,  scale = (max - min) / 3
    symmetric   x ~ (code - 2) * scale,     scale = max |x| / 1

A scale and a zero for each token and head are FlexGen's scheme (arXiv:2303.06865) with groups as wide
as a head: 2.25 bits at head_dim 128, 2.5 at 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvloom.formats._uniform import Uniform


@dataclass(frozen=True)
class Int2(Uniform):
    __doc__ = (Uniform.__doc__ or "").replace("Integer codes", "2-bit codes", 1)

    bits: ClassVar[int] = 2

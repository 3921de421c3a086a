"""Integer codes of 3 bits, per token unless said otherwise.

    asymmetric  x ~ code * scale + zero,    zero = min,  scale = (max - min) / 7
    symmetric   x ~ (code - 4) * scale,     scale = max |x| / 3

A scale and a zero for each token and head are FlexGen's scheme (arXiv:2303.06865) with groups as wide
as a head: 3.25 bits at head_dim 128, 3.5 at 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvloom.formats._uniform import Uniform


@dataclass(frozen=True)
class Int3(Uniform):
    __doc__ = (Uniform.__doc__ or "").replace("Integer codes", "3-bit codes", 1)

    bits: ClassVar[int] = 3

"""Integer codes of 8 bits, per token unless said otherwise.

    asymmetric  x ~ code * scale + zero,    zero = min,  scale = (max - min) / 255
    symmetric   x ~ (code - 128) * scale,   scale = max |x| / 127

A scale and a zero for each token and head are FlexGen's scheme (arXiv:2303.06865) with groups as wide
as a head: 8.25 bits at head_dim 128, 8.5 at 64. `int8(value_bits=4)` is K8V4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvloom.formats._uniform import Uniform


@dataclass(frozen=True)
class Int8(Uniform):
    __doc__ = (Uniform.__doc__ or "").replace("Integer codes", "8-bit codes", 1)

    bits: ClassVar[int] = 8

"""Integer codes of 8 bits, per token unless said otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvloom.formats._uniform import Uniform


@dataclass(frozen=True)
class Int8(Uniform):
    __doc__ = (Uniform.__doc__ or "").replace("Integer codes", "8-bit codes", 1)

    bits: ClassVar[int] = 8

"""KIVI (arXiv:2402.02750): keys per channel, values per token, the newest tokens exact.

    code = round((x - z) / s),    z = min,    s = (max - min) / (2^b - 1)

with z and s of each channel and `group` tokens for keys (loud channels stay loud), and of each token and
`group` channels for values; keys after rotation. At 2 bits and groups of 32, fp16 z and s make it 3 bits.

Deviations:
- An entry's key and value are quantized together, 64 entries at a time once there are 64 + `residual`.
  The paper quantizes keys in blocks of `residual`, so that between none and that many are exact, and
  values one by one. Here the newest `residual` to `residual` + 63 of both are.
- Groups of values do not cross heads; the last of a width that is no multiple has what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.core.policy import check, one_of
from kvloom.formats._grid import Grid
from kvloom.formats._uniform import Gridded


@dataclass(frozen=True)
class Kivi(Gridded):
    """Keys per channel and values per token, asymmetric, with an exact window of the newest.

    Attributes:
        bits: 2 or 4. residual: how many of the newest entries are exact at least.
        group: tokens that share a key channel's scale and channels that share a value's, 32 or 64.
    """

    bits: int = 2
    residual: int = 128
    group: int = 32

    def __post_init__(self) -> None:
        check(self, one_of(self.bits, (2, 4)), "bits is 2 or 4")
        whole = type(self.residual) is int and self.residual >= 0
        check(self, whole, "residual is an int >= 0")
        check(self, one_of(self.group, (32, 64)), "group is 32 or 64")

    @property
    def grids(self) -> tuple[Grid, Grid]:
        return (
            Grid("key", self.bits, "channel", group=self.group),
            Grid("value", self.bits, "token", channels=self.group),
        )

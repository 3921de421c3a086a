"""KVQuant: non-uniform levels for pre-RoPE keys per channel and values per token (arXiv:2401.18079).

    k_tc ~ o_c + s_c * level_K[code]      v_tc ~ o_t + s_t * level_V[code]

Offset o and scale s span the range without outliers: of a key channel as calibrated, of a token's
values as they come. A layer's levels minimise E[F (x - q(x))^2], F = (d loss / d x)^2 being the Fisher
information (`kvloom calibrate`). Outliers, 1 % of both, are stored exactly with their places, and so
is the first token. Q-norm shifts and stretches the levels that are read, so that mean and deviation
are those of the numbers coded.

Deviations: a tile of 32 tokens has a fixed number of key outliers, the farthest out for their
channels, where the paper takes all beyond a calibrated threshold: tiles can be freed. A token's values
are one head's, as pages are; its outliers are the farthest from the median, whatever the side.

Without a calibration, a key channel's range is its page's, and the levels are those of a normal
distribution: our own variant, 0.5 bits per key larger, blind to what the model computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Field, Layout, PageBatch, PageFormat, Place, Stored
from kvloom.core.policy import check, one_of
from kvloom.formats import _levels, _ranges, _sparse
from kvloom.formats._calibration import Calibration, calibrated
from kvloom.kernels.layout import TILE
from kvloom.kernels.packed import Parts

RANGE = ("key_offset", "key_scale")


@dataclass(frozen=True)
class KVQuant(PageFormat):
    """Non-uniform levels, pre-RoPE keys per channel, values per token, exact outliers.

    Attributes:
        bits: 4, 3 or 2, of keys and values.
        outliers: share of the keys (of each tile of 32 tokens) and values (of each token) stored
            exactly, at least one; 0: none, and with a calibration entries move one by one.
        calibration: file that `kvloom calibrate` wrote for this model, these bits and this share.
        q_norm: match mean and standard deviation; None: at 2 bits only, as in the paper.
    """

    bits: int = 4
    outliers: float = 0.01
    calibration: str | None = field(default=None, metadata={"file": True})
    q_norm: bool | None = None

    pre_rope = True
    pinned = 1

    def __post_init__(self) -> None:
        check(self, one_of(self.bits, (4, 3, 2)), "bits is 4, 3 or 2")
        share = type(self.outliers) in (int, float) and 0 <= self.outliers < 0.5
        check(self, share, "outliers is a share, 0 <= outliers < 0.5")
        path = self.calibration is None or isinstance(self.calibration, str)
        check(self, path and self.calibration != "", "calibration is a file's path, or None")
        known = self.q_norm is None or type(self.q_norm) is bool
        check(self, known, "q_norm is True, False or None")

    @property
    def movable(self) -> bool:
        return self.calibration is not None and not self.outliers

    def fit(self, place: Place) -> None:
        self._calibrated(place)

    def _calibrated(self, place: Place) -> Calibration | None:
        return calibrated(self, self.calibration, place, bits=self.bits, outliers=self.outliers)

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        tile = _levels.fields(self.bits, key_dim, value_dim)
        tile |= _ranges.PLANES | _sparse.fields("key", self.outliers, TILE * key_dim, dtype)
        channel = Field((key_dim,), torch.float16, "key", metadata=True)
        sets = {} if self.calibration else {"ranges": dict.fromkeys(RANGE, channel)}
        return Layout(_sparse.fields("value", self.outliers, value_dim, dtype), tile, sets)

    def tables(self, place: Place, device: torch.device) -> dict[str, Tensor]:
        found = self._calibrated(place)
        q_norm = self.bits == 2 if self.q_norm is None else self.q_norm
        levels = found.levels(place.layer) if found else [_levels.normal(self.bits)] * 2
        made = _levels.tables(levels, q_norm, place.heads)
        if found:
            made |= {name: getattr(found, name)[place.layer] for name in RANGE}
        return {name: x.to(device) for name, x in made.items()}

    def packed(self, key_dim: int, value_dim: int) -> Parts:
        home = "table" if self.calibration else "ranges"
        return _levels.packed((key_dim, value_dim), self.bits, home, self.outliers)

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        layout = self.layout(batch.keys.shape[2], batch.values.shape[2], batch.keys.dtype)
        ranges = (batch.tables[name][batch.head] for name in RANGE if name in batch.tables)
        keys = _ranges.of_keys(batch.keys, self.outliers, *ranges)
        values = _ranges.of_values(batch.values, self.outliers)
        tile = values.planes() | _levels.encode(keys.x, values.x, batch.tables, batch.head)
        tiles = batch.keys.unflatten(1, (-1, TILE)).flatten(2)
        tile |= _sparse.take("key", tiles, keys.index, layout.tile)
        slot = _sparse.take("value", batch.values, values.index, layout.slot)
        return Encoded(slot, tile, {"ranges": keys.sets()} if layout.sets else {})

    def outlier_counts(self, stored: Stored) -> Tensor | None:
        return _sparse.counts(stored)

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.calibration:  # a head's, for all of its tiles
            offset, scale = (stored.tables[name][:, None, None] for name in RANGE)
        else:
            offset, scale = (stored.sets["ranges"][name][..., None, :] for name in RANGE)
        keys = _levels.decode("key", stored) * scale + offset
        keys = _sparse.put("key", keys.flatten(-2), stored.tile).unflatten(-1, (TILE, -1))
        offset, scale = (stored.tile[f"value_{n}"].transpose(-1, -2) for n in ("offset", "scale"))
        values = _levels.decode("value", stored) * scale + offset
        values = _sparse.put("value", values.flatten(-3, -2), stored.slot)
        return keys.flatten(-3, -2).to(dtype), values.to(dtype)

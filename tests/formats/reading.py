"""Reading back what a format encoded, page by page, without a pool; numbers of fp16, by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.core.format import TILES, Encoded, PageBatch, PageFormat, Place, Stored

TINY = 2.0**-24  # the least distance of fp16 numbers
LARGEST = torch.finfo(torch.float16).max


def fp16(x: float) -> float:
    return float(torch.tensor(min(max(x, -LARGEST), LARGEST)).half())


def fp16_below(x: float) -> float:
    """The largest finite fp16 number that is not above x."""
    near = np.float16(min(max(x, -LARGEST), LARGEST))
    above = float(near) > max(x, -LARGEST)
    return float(np.nextafter(near, np.float16(-np.inf)) if above else near)


def place_of(key_dim: int, value_dim: int, heads: int = 1, rope: Any = None) -> Place:
    return Place(0, 1, heads, key_dim, value_dim, rope)


def tensors(encoded: Encoded) -> dict[str, Tensor]:
    """Everything that was made, by path."""
    found = {f"slot.{n}": x for n, x in encoded.slot.items()}
    found |= {f"tile.{n}": x for n, x in encoded.tile.items()}
    for family, sets in encoded.sets.items():
        found |= {f"{family}.{n}": x for n, x in sets.fields.items()}
        found[f"{family} ids"] = torch.as_tensor(sets.of)
    return found | {f"statistics.{n}": x for n, x in encoded.statistics.items()}


def stored_page(encoded: Encoded, page: int, tables: dict[str, Tensor], widths) -> Stored:
    """One page as a pool hands it to a format, with leading dimensions (row, head)."""
    slot = {name: x[page][None, None] for name, x in encoded.slot.items()}
    tile = {name: x[page][None, None] for name, x in encoded.tile.items()}
    sets, has = {}, {}
    for family, own in encoded.sets.items():
        of = torch.as_tensor(own.of[page]).expand(TILES)
        if next(iter(own.fields.values())).shape[0]:
            sets[family] = {n: x[of.clamp_min(0).long()][None, None] for n, x in own.fields.items()}
            has[family] = (of >= 0)[None, None]
    return Stored(*widths, slot, tile, sets, has, tables)


@dataclass
class Cell:
    """A single (row, head) that seals pages in turn and reads them back at once."""

    fmt: PageFormat
    place: Place
    head: int = 0
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = self.fmt.tables(self.place, torch.device("cpu"))
        self.tables = {name: x[self.head : self.head + 1] for name, x in tables.items()}

    def encode(self, keys: Tensor, values: Tensor) -> Encoded:
        """Pages `[N, 64, D]`, sealed together."""
        none = torch.zeros(len(keys), dtype=torch.long)
        batch = PageBatch(keys, values, none, none, 1, 1, self.tables)
        encoded = self.fmt.encode(batch, self.statistics)
        self.statistics = encoded.statistics or self.statistics
        return encoded

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What these pages read back as, `[N, 64, D]` and `[N, 64, E]`."""
        encoded, widths = self.encode(keys, values), (keys.shape[2], values.shape[2])
        pages = [
            self.fmt.decode(stored_page(encoded, i, self.tables, widths), keys.dtype)
            for i in range(len(keys))
        ]
        return torch.cat([k[0] for k, _ in pages]), torch.cat([v[0] for _, v in pages])

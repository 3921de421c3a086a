"""Pages of streaming_kvquant: scales per chunk, side planes per tile, keys and values together."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.format import Encoded, Field, Layout, PageBatch, Sets, Stored
from kvloom.formats import _streaming
from kvloom.formats._streaming_codes import Channels, Planes
from kvloom.kernels.layout import LIMIT
from kvloom.kernels.packed import PackedPart

Parts = tuple[Channels, Channels]  # of keys and of values
SCALES = "scales"


def layout(parts: Parts, widths: tuple[int, int], dtype: torch.dtype) -> Layout:
    """Codes in tiles, a family of scales, a family of planes for keys and one for values."""
    made, scales = Layout(), {}
    for part, width in zip(parts, widths, strict=True):
        if part.exact:
            made.slot[f"{part.part}s"] = Field((width,), dtype, part.part)
            continue
        made.tile.update(part.tile_fields(width))
        scales.update(part.set_fields(width))
        if part.room:
            made.sets[part.family] = part.plane_fields(width)
    families = ({SCALES: scales} if scales else {}) | made.sets
    return Layout(made.slot, made.tile, families, frozenset(made.sets))


def encode(
    parts: Parts, rule: _streaming.Rule, batch: PageBatch, statistics: dict[str, Tensor]
) -> Encoded:
    """See `PageFormat.encode`. Statistics: e per channel, and how many chunks there were."""
    coded = [(p, x) for p, x in zip(parts, (batch.keys, batch.values), strict=True) if not p.exact]
    out = Encoded({f"{p.part}s": getattr(batch, f"{p.part}s") for p in parts if p.exact})
    if not coded:
        return out
    partner = batch.tables["partner"][0] if "partner" in batch.tables else None
    of_pages = [_streaming.peaks(x, partner if p.part == "key" else None) for p, x in coded]
    chunks = rule.chunks(batch, torch.cat(of_pages, 1))
    cells = batch.keys.new_zeros(batch.rows, batch.heads, dtype=torch.int32)
    updates, scales = statistics.get("updates", cells), {}
    for (part, x), peaks in zip(coded, of_pages, strict=True):
        a, name = chunks.largest(peaks), f"{part.part}_peak"
        e = statistics.get(name, a.new_zeros(*cells.shape, a.shape[1]))
        out.statistics[name], before, after = rule.follow(e, updates, a, chunks)
        planes = None
        if part.room:
            planes = Planes.of(rule.severity(a, before), a, part.room)
            out.sets[part.family] = part.encode_planes(x, chunks.of, planes)
        codes, scale = part.encode(x, chunks.of, after, planes)
        out.tile.update(codes)
        scales.update(scale)
    out.statistics["updates"] = _streaming.counted(updates, chunks)
    out.sets[SCALES] = Sets(scales, chunks.of)
    return out


def packed(parts: Parts, widths: tuple[int, int]) -> tuple[PackedPart | None, PackedPart | None]:
    """See `PageFormat.packed`."""
    keys, values = (
        None if part.exact else part.packed(width, SCALES)
        for part, width in zip(parts, widths, strict=True)
    )
    return keys, values


def decode(parts: Parts, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `PageFormat.decode`."""
    read = []
    for part, width in zip(parts, (stored.key_dim, stored.value_dim), strict=True):
        if part.exact:
            read.append(stored.slot[f"{part.part}s"].to(dtype))
            continue
        planes, has = stored.sets.get(part.family), stored.has.get(part.family)
        x = part.decode(stored.tile, stored.sets[SCALES], planes, has, width)
        if dtype == torch.float16:  # the lowest code of a clipped channel may lie beyond
            x = x.clamp_(-LIMIT, LIMIT)
        read.append(x.to(dtype))
    return read[0], read[1]


def outlier_counts(parts: Parts, stored: Stored) -> Tensor | None:
    """See `PageFormat.outlier_counts`."""
    counts = [
        part.count(stored.sets[part.family]) * stored.has[part.family]
        for part in parts
        if part.family in stored.sets
    ]
    return sum(counts[1:], start=counts[0]) if counts else None

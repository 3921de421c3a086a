"""Non-uniform levels: one sorted codebook for numbers that were normalised to [-1, 1].

    x ~ level[code],   levels = argmin sum_i w_i (x_i - nearest(x_i))^2

The sum is over what calibration saw and w is the Fisher information (KVQuant, arXiv:2401.18079);
without calibration x is taken to be normal. The paper's k-means finds a local optimum; in one
dimension the optimum itself costs little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import exp

import torch
from torch import Tensor

from kvloom.core.format import Field, Part, Stored
from kvloom.kernels import cpu_encode, ops
from kvloom.kernels.layout import TILE, Codes, tile_nbytes, unpack_keys, unpack_values
from kvloom.kernels.packed import PackedPart, Parameter, Parts

Levels = tuple[Tensor, Tensor]  # plain, and with Q-norm
PARTS: tuple[Part, ...] = ("key", "value")
# Half the range of 64 normal numbers is about 2.4 standard deviations.
NORMAL_SPREAD = 1 / 2.4
GRID = 1024  # points that stand for a density


def kmeans(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """The `count` levels of least weighted squared error, ascending, fp64.

    Args:
        points: `[n]`, ascending. weights: `[n]`, not negative.

    The optimum itself, by dynamic programming over where clusters end, not a local one. With fewer
    points than levels, the last level is repeated.
    """
    used = weights > 0
    x, w = points[used].double(), weights[used].double()
    if len(x) <= count:
        return torch.cat([x, x[-1:].expand(count - len(x))]) if len(x) else torch.zeros(count)
    sums = torch.stack([w, w * x, w * x * x]) / w.sum()
    total = torch.cat([torch.zeros(3, 1, dtype=torch.float64), sums.cumsum(1)], 1)
    mass, first, second = total[:, None, :] - total[:, :, None]  # of points i .. j-1, as [i, j]
    cost = (second - first**2 / mass.clamp_min(1e-300)).clamp_min(0)
    cost = cost.masked_fill(mass <= 0, float("inf"))
    best, starts = cost[0], []
    for _ in range(count - 1):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    end, levels = len(x), []
    for start in [*reversed(starts), torch.zeros(len(x) + 1, dtype=torch.long)]:
        begin = int(start[end])
        levels.append(first[begin, end] / mass[begin, end])
        end = begin
    return torch.stack(levels[::-1])


def matched(levels: Tensor, points: Tensor, counts: Tensor) -> Tensor:
    """`levels` shifted and stretched so that coded points have the mean and standard deviation of
    the points themselves (Q-norm), each point `counts` times.
    """
    share = counts.double() / counts.sum()
    x, coded = points.double(), levels.double()[torch.bucketize(points.double(), between(levels))]
    means = [(share * v).sum() for v in (x, coded)]
    spread, own = (
        (share * (v - m) ** 2).sum().sqrt() for v, m in zip((x, coded), means, strict=True)
    )
    return (levels - means[1]) * (spread / own if own > 0 else 1.0) + means[0]


def between(levels: Tensor) -> Tensor:
    """Where one code ends and the next begins: `[..., K]` levels -> `[..., K - 1]`."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


@cache
def normal(bits: int) -> Levels:
    """Levels `[2^bits]` for normal numbers within their range, plain and with Q-norm; fp64."""
    points = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (2 / GRID) - 1
    weights = torch.tensor([exp(-((x / NORMAL_SPREAD) ** 2) / 2) for x in points.tolist()])
    levels = kmeans(points, weights, 1 << bits)
    return levels, matched(levels, points, weights)


@cache
def lloyd_max(bits: int, device: torch.device) -> Tensor:
    """Ascending fp32 `[2^bits]`: each the mean of the standard normal over its cell, and each border
    of two cells halfway between their levels.
    """
    inner = torch.linspace(0, 1, (1 << bits) + 1, dtype=torch.float64)[1:-1]
    border = torch.special.ndtri(inner) * 3**0.5  # dense as the density's cube root: nearly right
    end = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(500):
        edge = torch.cat([-end, border, end])
        density = torch.exp(-edge * edge / 2) / (2 * torch.pi) ** 0.5
        level = -density.diff() / torch.special.ndtr(edge).diff()
        border = (level[1:] + level[:-1]) / 2
    found: Tensor = level.float().to(device)
    return found


def tables(levels: Sequence[Levels], q_norm: bool, heads: int) -> dict[str, Tensor]:
    """For every head the bounds between codes `[H, K - 1]` and the levels that they mean `[H, K]`;
    `levels` are those of keys and of values.
    """
    made = {}
    for part, (plain, matched) in zip(PARTS, levels, strict=True):
        made[f"{part}_bounds"], made[f"{part}_levels"] = between(plain), (plain, matched)[q_norm]
    return {name: x.float().expand(heads, -1).clone() for name, x in made.items()}


def fields(bits: int, key_dim: int, value_dim: int) -> dict[str, Field]:
    """The fields of a tile's packed codes."""
    return {
        f"{part}_codes": Field(
            (tile_nbytes(width, bits),), torch.uint8, part, Codes(part, bits, width)
        )
        for part, width in zip(PARTS, (key_dim, value_dim), strict=True)
    }


def packed(widths: tuple[int, int], bits: int, ranges: str, outliers: float) -> Parts:
    """How kernels read keys per channel, whose offsets and scales lie in `ranges`, and values per token."""
    return (
        _packed("key", bits, widths[0], "channel", ranges, outliers),
        _packed("value", bits, widths[1], "token", "tile", outliers),
    )


def _packed(part: Part, bits: int, width: int, per: str, home: str, outliers: float) -> PackedPart:
    offset, scale = (Parameter(f"{part}_{name}", home) for name in ("offset", "scale"))
    exact = (f"{part}_outliers", f"{part}_index") if outliers else None
    return PackedPart(
        "levels", bits, width, per, f"{part}_codes", scale, offset,
        levels=f"{part}_levels", outliers=exact,
    )  # fmt: skip


def encode(
    keys: Tensor, values: Tensor, tables: Mapping[str, Tensor], head: Tensor
) -> dict[str, Tensor]:
    """Normalised pages `[N, 64, W]` as packed codes `[N, 2, bytes]`; tables `[H, ...]`, and the `head` of each
    page, host int64 `[N]`.
    """
    packed = {}
    for part, x in zip(PARTS, (keys, values), strict=True):
        packed[f"{part}_codes"], _ = code(part, x, tables[f"{part}_bounds"], head)
    return packed


def code(
    part: Part, x: Tensor, bounds: Tensor, of: Tensor, level: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes of normalised pages `x [N, 64, W]` by `bounds [R, K - 1]`, a row for each page (host `of
    [N]`), and, given the `level [K]` that codes mean, the norms of what is coded, fp32 `[N, 64]`.
    """
    if ops.cpu_encodes(x):
        return cpu_encode.by_levels(x, bounds, of, part == "key", level)
    if len(bounds) == 1:
        codes = torch.bucketize(x, bounds[0])
    else:
        codes = torch.searchsorted(bounds[of], x.flatten(1)).view(x.shape)
    codec = Codes(part, bounds.shape[1].bit_length(), x.shape[2])
    packed = codec.pack(codes.unflatten(1, (-1, TILE)))
    if level is None:
        return packed, x.new_empty(0)
    # fp64: the same in whatever order it is added up
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    return packed, level.to(exact).square()[codes].sum(-1).sqrt().float()


def decode(part: Part, stored: Stored) -> Tensor:
    """fp32 levels `[..., h, T, 32, W]` of the packed codes of a run."""
    packed, levels = stored.tile[f"{part}_codes"], stored.tables[f"{part}_levels"]
    heads, size = levels.shape
    bits, first = size.bit_length() - 1, torch.arange(heads, device=levels.device) * size
    if part == "key":
        codes = unpack_keys(packed, bits, stored.key_dim)
    else:
        codes = unpack_values(packed, bits, stored.value_dim)
    return levels.flatten()[codes + first[:, None, None, None]]

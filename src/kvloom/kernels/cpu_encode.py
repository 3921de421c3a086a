"""Pages to packed codes by the C++ kernels, in one pass. The torch of `kvloom.formats` defines what comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvloom.kernels.cpu_backend import DTYPES, address, isa, loaded
from kvloom.kernels.layout import TILE, tile_nbytes

RANGES, SCALED, LEVELS, FP8 = range(4)  # types.h: Encode::Rule


def by_ranges(
    x: Tensor,
    codes: Tensor,
    parameters: list[Tensor],
    bits: int,
    keys: bool,
    per_token: bool,
    group: int,
) -> None:
    """Lay pages `x [N, 64, W]` on uniform grids: packed `codes` and fp16 `parameters`, a scale and, unless the
    grid is symmetric, a zero (see `kvloom.formats._grid`).
    """
    x = x.contiguous()
    call = _call(RANGES, x, codes, bits, keys)
    call.per_token, call.group, call.symmetric = per_token, group, len(parameters) == 1
    call.scale = address(parameters[0], torch.float16)
    if len(parameters) == 2:
        call.zero = address(parameters[1], torch.float16)
    _run(call, x)


def by_scales(x: Tensor, scales: Tensor, of: Tensor, bits: int, keys: bool) -> Tensor:
    """Packed codes of pages `x [N, 64, W]` on symmetric grids: fp16 `scales [M, W]` of channels, and int64
    `of [N]`, whose a page's are.
    """
    x, scales, of = x.contiguous(), scales.contiguous(), _rows(of, len(x), len(scales))
    _check_shape("scales", scales, (len(scales), x.shape[2]))
    codes = _codes(x, bits)
    call = _call(SCALED, x, codes, bits, keys)
    call.given, call.of = address(scales, torch.float16), address(of, torch.int64)
    _run(call, x)
    return codes


def by_levels(
    x: Tensor, bounds: Tensor, of: Tensor, keys: bool, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes of normalised pages `x [N, 64, W]`: how many of the fp32 `bounds [M, 2^bits - 1]` lie below;
    int64 `of [N]`: whose a page's are. With fp32 `levels [2^bits]` also the norms of the coded tokens, fp32
    `[N, 64]`, else none.
    """
    x, bounds, of = x.contiguous(), bounds.contiguous(), _rows(of, len(x), len(bounds))
    bits = bounds.shape[1].bit_length()
    _check_shape("bounds of 2 to 4 bits", bounds, (len(bounds), (1 << min(max(bits, 2), 4)) - 1))
    codes = _codes(x, bits)
    call = _call(LEVELS, x, codes, bits, keys)
    call.bounds, call.of = address(bounds, torch.float32), address(of, torch.int64)
    norms = torch.empty(x.shape[:2] if levels is not None else 0, dtype=torch.float32)
    if levels is not None:
        _check_shape("levels", levels, (1 << bits,))
        call.levels, call.norms = address(levels, torch.float32), address(norms)
    _run(call, x)
    return codes, norms


def by_peaks(x: Tensor, keys: bool) -> tuple[Tensor, Tensor]:
    """Packed e4m3 codes of pages `x [N, 64, W]`, and fp16 scales `[N, 2, 1, 32]` of their tokens."""
    x = x.contiguous()
    codes, scales = _codes(x, 8), torch.empty(len(x), 2, 1, TILE, dtype=torch.float16)
    call = _call(FP8, x, codes, 8, keys)
    call.scale = address(scales)
    _run(call, x)
    return codes, scales


def _codes(x: Tensor, bits: int) -> Tensor:
    return torch.empty(len(x), 2, tile_nbytes(x.shape[2], bits), dtype=torch.uint8)


def _rows(of: Tensor, pages: int, most: int) -> Tensor:
    """`of`, checked: kernels read what it points at."""
    if of.shape != (pages,) or (pages and not 0 <= int(of.min()) <= int(of.max()) < most):
        raise ValueError(f"{tuple(of.shape)} places of {pages} pages must be among {most} rows")
    return of.contiguous()


def _check_shape(what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{what}: {tuple(x.shape)} should be {shape}")


def _call(rule: int, x: Tensor, codes: Tensor, bits: int, keys: bool) -> Any:
    call = loaded().Encode()
    call.rule, call.source, call.dtype = rule, x.data_ptr(), DTYPES[x.dtype]
    call.width, call.bits, call.keys, call.codes = x.shape[2], bits, keys, address(codes)
    return call


def _run(call: Any, x: Tensor) -> None:
    loaded().encode(call, len(x), isa(), torch.get_num_threads())

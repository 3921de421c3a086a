"""The Triton kernels: whether they can run, layers as they see them, and their launches.

They serve CUDA tensors. On the CPU they run in Triton's interpreter, which proves them but is slow, and
only where `TRITON_INTERPRET=1` and `KVLOOM_BACKEND=triton` ask for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvloom.kernels.layout import TILE, Codes, padded, tile_nbytes
from kvloom.kernels.packed import PackedPart, Parameter

PAGE = 64
QUERIES = 16  # of one head that are served at once; more are faster by matrix products
WIDEST = 512
ROWS = 64  # queries of a program at most
EXACT = 128  # exact entries of a program
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def missing() -> str | None:
    """The reason why the kernels cannot run anywhere, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'kvloom[gpu]')"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtype: torch.dtype, width: int, forced: bool) -> str | None:
    """The reason why the kernels cannot take keys or values like these, or None; `forced`: whether
    `KVLOOM_BACKEND=triton`.
    """
    if device.type == "cpu" and not (forced and interpreted()):
        return "the cache is on the CPU, and Triton's interpreter was not asked for"
    if device.type not in ("cuda", "cpu"):
        return f"the cache is on {device.type}"
    if width > WIDEST:
        return f"heads are wider than {WIDEST}"
    if dtype not in DTYPES:
        return f"the model's dtype is {dtype}"
    return missing()


@cache
def kernels(name: str) -> Any:
    """A module of `kvloom.kernels.triton`."""
    return importlib.import_module(f"kvloom.kernels.triton.{name}")


def launch(module: str, name: str, grid: tuple[int, ...], device: torch.device) -> Any:
    """A kernel, to be called with its arguments, on the device of its tensors: Triton takes the current one."""
    kernel = getattr(kernels(module), name)[grid]
    if device.type != "cuda":
        return kernel

    def there(*arguments: Any, **options: Any) -> None:
        with torch.cuda.device(device):
            kernel(*arguments, **options)

    return there


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dense(width: int) -> Any:
    """The `Spec` of entries as they are."""
    return kernels("spec").Spec("dense", width, padded(width))


def row_length() -> int:
    """Addresses that a table has for each slab."""
    return int(kernels("spec").ROW.value)


def triton_dtype(dtype: torch.dtype) -> Any:
    language = importlib.import_module("triton.language")
    return getattr(language, str(dtype).removeprefix("torch."))


def address(x: Tensor) -> int:
    """Where a contiguous tensor lies. Raises ValueError for others."""
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            f"a kernel needs a contiguous tensor at a multiple of 16 bytes, not {tuple(x.shape)} of "
            f"{x.dtype} with strides {x.stride()} at {x.data_ptr()}"
        )
    return x.data_ptr()


@dataclass
class Fields:
    """The tensors of a slab, as `cpu_backend.Fields`; `tables`: the layer's."""

    tile: Mapping[str, Tensor]
    slot: Mapping[str, Tensor]
    sets: Mapping[str, Mapping[str, Tensor]]
    index: Mapping[str, Tensor]
    tables: Mapping[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)

    def _home(self, p: Parameter) -> tuple[Any, Tensor, Tensor | None]:
        home = kernels("spec").Home
        if p.home == "tile":
            x = self.tile[p.name]
            return home("tile", x.stride(1)), x, None
        if p.home == "table":
            x = self.tables[p.name]
            return home("table", x.stride(0)), x, None
        x = self.sets[p.home][p.name]
        return home("set", x.stride(0)), x, self.index[p.home]

    def part(self, part: PackedPart | None, which: str, width: int) -> tuple[Any, list[int]]:
        """A part's `Spec`, and the addresses of its fields in this slab, in the order of `spec.py`;
        `which`: the slot field of a dense part.
        """
        row = [0] * int(kernels("spec").PART.value)
        if part is None:
            row[0] = address(self.slot[which])
            return dense(width), row
        facts: dict[str, Any] = {"kind": part.kind, "width": part.width, "padded": padded(part.width),
            "bits": part.bits, "words": tile_nbytes(part.width, part.bits) // 4,
            "per_token": part.per == "token", "group": part.group,
            "middle": float(part.middle)}  # fmt: skip
        row[0] = address(self.tile[part.codes])
        for name, p, at in (("scale", part.scale, 1), ("zero", part.zero, 3)):
            if p is not None:
                facts[name], x, index = self._home(p)
                row[at], row[at + 1] = address(x), 0 if index is None else address(index)
        if part.kind == "levels":
            facts["levels"], row[5] = self._levels(part)
        if part.outliers is not None:
            numbers, places = (
                (self.tile if name in self.tile else self.slot)[name] for name in part.outliers
            )
            facts |= {"outliers": numbers.shape[-1], "outlier_dtype": triton_dtype(numbers.dtype),
                      "wide_places": places.dtype == torch.int16}  # fmt: skip
            row[6], row[7] = address(numbers), address(places)
        if part.plane is not None and part.plane[0] in self.sets:
            facts |= self._plane(*part.plane, row)
        return kernels("spec").Spec(**facts), row

    def _levels(self, part: PackedPart) -> tuple[int, int]:
        if isinstance(part.levels, str):
            table = self.tables[part.levels]
            return table.stride(0), address(table)
        assert part.levels is not None
        device = next(iter(self.tile.values())).device
        held = self.constants.setdefault(part.codes, part.levels.to(device))
        return 0, address(held)

    def _plane(self, family: str, prefix: str, row: list[int]) -> dict[str, Any]:
        fields = self.sets[family]
        numbers, ids = fields[prefix], fields[f"{prefix}_ids"]
        scale = fields.get(f"{prefix}_scale")
        row[8], row[9], row[11] = address(numbers), address(ids), address(self.index[family])
        row[10] = 0 if scale is None else address(scale)
        return {"plane": ids.shape[-1], "plane_dtype": triton_dtype(numbers.dtype),
                "plane_scaled": scale is not None, "wide_ids": ids.dtype == torch.int16}  # fmt: skip


def splits(pages: list[int], programs: int, device: torch.device) -> Tensor:
    """Runs of pages for slabs of so many pages, int32 `[S, 4]` (slab, first and last page, slots of the
    slabs before), so that there are enough programs to fill the device, `programs` being those of one run.
    """
    wanted = max(1, 4 * multiprocessors(device) // max(1, programs))
    each, before, runs = max(2, -(-sum(pages) // wanted)), 0, []
    for i, n in enumerate(pages):
        runs += [(i, start, min(start + each, n), before) for start in range(0, n, each)]
        before += n * PAGE
    return torch.tensor(runs, dtype=torch.int32).to(device, non_blocking=True)


@dataclass
class Exact:
    """A run of exact entries `[B, H, S, W]` (any strides but the last): `stop` of each cell at most.

    Attributes:
        query: `[cells, M, D]`. bias: fp32 `[B, H, C]`, or None. count: int32 `[cells]` on the device.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    stop: int
    bias: Tensor | None = None
    count: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        strides = (*self.keys.stride()[:3], *self.values.stride()[:3])
        slots = 0 if self.bias is None else self.bias.shape[2]
        return self.query, self.keys, self.values, self.bias, self.count, (*strides, slots)

    @property
    def runs(self) -> int:
        return -(-self.stop // EXACT)


@dataclass
class Pages:
    """The pages of a layer as the kernels know them.

    Attributes:
        key, value, rope: their `Spec`s and `Rope`. frequencies: fp32, of `rope`.
        table: int64 `[slabs, 30]`, cells: int32 `[slabs, cells, 3]`, splits: int32 `[S, 4]`.
    """

    key: Any
    value: Any
    rope: Any
    frequencies: Tensor | None
    table: Tensor
    cells: Tensor
    splits: Tensor

    def roomy(self, slabs: int, runs: int) -> Pages:
        """Tables of the same pages with room for others, to be filled by `take`."""
        cells = self.cells.new_zeros(slabs, *self.cells.shape[1:])
        table = self.table.new_zeros(slabs, self.table.shape[1])
        splits = self.splits.new_zeros(runs, self.splits.shape[1])
        return replace(self, table=table, cells=cells, splits=splits)

    def clear(self) -> None:
        """Say that there are no pages, in place."""
        self.splits.zero_()

    def take(self, other: Pages) -> None:
        """Say what `other` says, where a captured graph reads it: in place, without waiting.

        Raises RuntimeError if there is no room for it, or its kernels are others.
        """
        if (self.key, self.value, self.rope) != (other.key, other.value, other.rope):
            raise RuntimeError(f"pages of {other.key} cannot follow pages of {self.key}")
        for mine, its in zip(
            (self.table, self.cells, self.splits),
            (other.table, other.cells, other.splits),
            strict=True,
        ):
            if len(its) > len(mine):
                raise RuntimeError(f"{len(its)} rows do not fit in a table of {len(mine)}")
            mine.zero_()
            mine[: len(its)] = its


@dataclass
class Launch:
    """What the launches of one call share: cells are (row, KV head), M their queries."""

    cells: int
    heads: int
    M: int
    width: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    softcap: float | None
    runs: int

    def __post_init__(self) -> None:
        rows = self.cells * self.M
        self.out = torch.empty(self.runs, rows, self.width, dtype=torch.float32, device=self.device)
        self.lse = torch.empty(self.runs, rows, dtype=torch.float32, device=self.device)

    @property
    def block(self) -> int:
        return min(ROWS, max(16, 1 << (self.M - 1).bit_length()))

    @property
    def grid(self) -> int:
        return self.cells * -(-self.M // self.block)

    def _options(self, pages: Pages) -> dict[str, Any]:
        """What kernels that read pages are compiled for."""
        half = self.dtype != torch.float32
        plain = pages.rope is None and not any(
            s.outliers or s.plane or s.kind == "levels" for s in (pages.key, pages.value)
        )  # the others need shared memory for more than one page at a time, or for what comes next
        return {"K": pages.key, "R": pages.rope, "M": self.block, "PAGES": 2 if half and plain else 1,
                "DTYPE": triton_dtype(self.dtype), "PRECISION": "tf32" if half else "ieee",
                "CAPPED": bool(self.softcap), "num_warps": 4 if plain else 8,
                "num_stages": 2 if plain else 1}  # fmt: skip

    def pages(self, query: Tensor, pages: Pages) -> None:
        """Runs 0 .. of `pages.splits`; `query [cells, M, D]`."""
        launch("attention", "attend_pages", (self.grid, len(pages.splits)), self.device)(
            query, pages.table, pages.cells, pages.splits, pages.frequencies, self.out, self.lse,
            self.M, self.cells, self.heads, self.scale, self.softcap or 1.0,
            V=pages.value, **self._options(pages),
        )  # fmt: skip

    def mass(self, query: Tensor, pages: Pages, norm: Tensor, received: Tensor) -> None:
        """Attention that pages receive, added up over `query [cells, M, D]`, to `received [cells, slots]`,
        which is 0; `norm [cells, M]`: normalisers over all tiers, +inf where a query does not vote.
        """
        launch("attention", "mass_of_pages", (self.cells, len(pages.splits)), self.device)(
            query, pages.table, pages.cells, pages.splits, pages.frequencies, norm, received,
            self.M, self.cells, received.shape[1], self.heads, self.scale, self.softcap or 1.0,
            PARTS=-(-self.M // self.block), **self._options(pages),
        )  # fmt: skip

    def exact(self, tail: Exact, sinks: Exact | None, first_run: int) -> None:
        """Runs `first_run` .. of tail and sinks."""
        key, value = dense(tail.keys.shape[3]), dense(tail.values.shape[3])
        other, stop = (tail, 0) if sinks is None else (sinks, sinks.stop)
        runs = tail.runs + (0 if sinks is None else sinks.runs)
        launch("attention", "attend_exact", (self.grid, runs), self.device)(
            tail.arguments(), other.arguments(), tail.stop, stop, self.out, self.lse, first_run,
            tail.runs, self.M, self.cells, self.heads, self.scale, self.softcap or 1.0,
            K=key, V=value, M=self.block, N=TILE, EACH=EXACT, DTYPE=triton_dtype(self.dtype),
            CAPPED=bool(self.softcap),
        )  # fmt: skip

    def combined(self, first: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Runs `first .. stop` as one: `out [cells, M, E]`, `lse [cells, M]`."""
        outs, lses = self.out[first:stop], self.lse[first:stop]
        out, lse = torch.empty_like(self.out[0]), torch.empty_like(self.lse[0])
        runs = 1 << (outs.shape[0] - 1).bit_length()
        launch("attention", "combine", (out.shape[0],), self.device)(
            outs, lses, out, lse, outs.shape[0], out.shape[0], WIDTH=self.width,
            BLOCK=1 << (self.width - 1).bit_length(), RUNS=max(4, min(32, runs)),
        )  # fmt: skip
        return out.view(self.cells, self.M, -1), lse.view(self.cells, self.M)


def decode(
    pages: Pages, slab: int, rows: int, heads: int, slots: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one slab as pages hold them, `[rows, heads, slots, W]` in `dtype`; zeros where a
    (row, head) has fewer pages.
    """
    device, n = pages.table.device, slots // PAGE
    keys, values = (
        torch.empty(rows, heads, slots, spec.width, dtype=dtype, device=device)
        for spec in (pages.key, pages.value)
    )
    launch("decode", "decode_pages", (rows * heads, n), device)(
        pages.table, pages.cells, keys, values, slab, n, rows * heads, heads,
        K=pages.key, V=pages.value, DTYPE=triton_dtype(dtype), num_warps=8,
    )  # fmt: skip
    return keys, values


def encode(
    x: Tensor,
    codes: Tensor,
    parameters: list[Tensor],
    bits: int,
    keys: bool,
    per_token: bool,
    group: int,
    turned: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """As `cpu_encode.by_ranges`; `turned`: the signs `[H, W]` and the matrix `[W, W]` of a rotation before
    it, and the head of each page, int32 `[N]`.
    """
    x, width = x.contiguous(), x.shape[2]
    scale, zero = parameters[0], parameters[-1]
    scratch = torch.empty(len(x), PAGE, padded(width), dtype=torch.uint8, device=x.device)
    signs, matrix, heads = (None, None, None) if turned is None else turned
    described = kernels("spec")
    spec = described.Spec(
        "uniform", width, padded(width), bits=bits, words=tile_nbytes(width, bits) // 4,
        per_token=per_token, group=group, zero=described.Home("tile", 0) if len(parameters) == 2 else None,
    )  # fmt: skip
    launch("quantize", "encode_pages", (len(x),), x.device)(
        x, codes.view(torch.int32), scale, zero, scratch, signs, heads, matrix,
        S=spec, KEYS=keys, BLOCK=max(16, 1 << (width - 1).bit_length()), num_warps=8,
    )  # fmt: skip


def move_codes(old: list[Tensor], slabs: Tensor, slots: Tensor, out: Tensor, codec: Codes) -> None:
    """Codes of slots to new tiles, `out [M, 2, bytes]` uint8: new slot i is slot `slots[i]` of
    `old[slabs[i]]`, as `out`, and 0 where `slabs[i]` is -1; both int32 `[M * 64]`.
    """
    width, bits = codec.width, codec.bits
    words = tile_nbytes(width, bits) // 4
    table = torch.tensor([address(x) for x in old], dtype=torch.int64)
    table = table.to(out.device, non_blocking=True)
    spec = kernels("spec").Spec("uniform", width, padded(width), bits=bits, words=words)
    launch("compact", "move_codes", (len(slots) // TILE,), out.device)(
        table, slabs, slots, out.view(torch.int32), S=spec, KEYS=codec.part == "key",
        BLOCK=1 << (words - 1).bit_length(),
    )  # fmt: skip


def join_centroids(
    slots: Tensor,
    at: Tensor,
    rows: Tensor,
    mass: Tensor,
    columns: int,
    ema: float | None = None,
) -> Tensor:
    """As `reference.join_centroids`."""
    M, b = at.shape
    out = slots.new_empty(M, b, columns + 1)
    log_ema = math.log(ema) if ema else -1e30  # of which 0 times is 0
    block = min(256, 1 << (columns - 1).bit_length())
    launch("centroids", "join_centroids", (M * b, -(-columns // block)), slots.device)(
        slots, at.contiguous(), rows.contiguous(), mass.contiguous(), out, b, slots.shape[1], log_ema,
        COLUMNS=columns, EMA=ema is not None, BLOCK=block, TOKENS=1 << (b - 1).bit_length(),
    )  # fmt: skip
    return out


def append(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, count: Tensor, ring: bool = False
) -> None:
    """One token of every cell, `key [cells, D]`, `value [cells, E]`, to slot `count [cells]` (int32, on the
    device) of `keys`, `values [.., slots, W]`; `count` goes up. In a `ring` the oldest gives way.
    """
    widths = key.shape[-1], value.shape[-1]
    launch("append", "append_token", (len(key),), key.device)(
        key, value, keys, values, count, keys.shape[-2], D=widths[0], E=widths[1],
        BLOCK=1 << (max(widths) - 1).bit_length(), RING=ring,
    )  # fmt: skip

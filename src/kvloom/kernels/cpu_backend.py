"""The C++ kernels: whether they are there, and layers as they see them.

Addresses are checked here, once, and handed over as integers.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvloom.kernels.packed import PackedPart, Parameter

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"uniform": 0, "levels": 1, "fp8": 2}
MODES = {"default": 0, "fast": 1, "exact": 2}
WIDEST = 512
INTERFACE = 3  # of the compiled module; counts up with every change of what is handed over
QUERIES = 16  # of one head that are served at once; more are faster by matrix products


@cache
def module() -> ModuleType | None:
    """The compiled module, or None if the package was built without it (which warns once)."""
    try:
        compiled = importlib.import_module("kvloom.kernels._cpu")
        if compiled.INTERFACE != INTERFACE:
            raise ImportError("they are of another version: reinstall kvloom")
        return compiled
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"kvloom was installed without CPU kernels that it can use ({error}): attention over packed pages "
            "runs in torch, which is slower; install a C++ compiler and reinstall kvloom",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def loaded() -> ModuleType:
    """The compiled module, where `ops.cpu_refusal` has found that it is there."""
    compiled = module()
    assert compiled is not None
    return compiled


@cache
def isa() -> str:
    """The instruction set in use: the CPU's best, or the one that `KVLOOM_ISA` names.

    Raises ValueError if this CPU, or this build, does not have it.
    """
    offered, asked = loaded().instruction_sets(), os.environ.get("KVLOOM_ISA")
    if asked is None:
        return str(offered[0])
    if asked not in offered:
        raise ValueError(f"KVLOOM_ISA={asked!r} cannot run here; use one of {', '.join(offered)}")
    return asked


@cache
def mode_name() -> str:
    """How queries meet uniform codes: `KVLOOM_CPU_MODE=default|fast|exact`.

    default: queries and weights as integers of 15 bits, which add at most 5 % (int8) and 0.5 % (int4
    and less) to the quantization's own rms error. fast: of 8 bits, which add 4 to 6 times that error
    at int8, 0.2 to 0.4 of it at int4, and are faster only with VNNI. exact: fp32.
    """
    name = os.environ.get("KVLOOM_CPU_MODE", "default")
    if name not in MODES:
        raise ValueError(f"KVLOOM_CPU_MODE={name!r} is unknown; use one of {', '.join(MODES)}")
    return name


def mode() -> int:
    """`mode_name` as the kernels know it."""
    return MODES[mode_name()]


def reset() -> None:
    """Read the environment again, as at the start of a process."""
    isa.cache_clear()
    mode_name.cache_clear()


def address(x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Where a contiguous CPU tensor lies. Raises ValueError for others."""
    if x.device.type != "cpu" or not x.is_contiguous() or (dtype and x.dtype != dtype):
        raise ValueError(
            f"a kernel needs a contiguous CPU tensor{f' of {dtype}' if dtype else ''}, not "
            f"{tuple(x.shape)} of {x.dtype} on {x.device} with strides {x.stride()}"
        )
    return x.data_ptr()


def dense(x: Tensor) -> Any:
    """Entries `[B, H, S, W]` (or pages `[N, 64, W]`) where they lie; only the width must be dense."""
    if x.device.type != "cpu" or x.stride(-1) != 1 or x.dtype not in DTYPES:
        raise ValueError(f"a kernel cannot read {x.dtype} on {x.device} with strides {x.stride()}")
    made = loaded().Dense()
    made.data, made.dtype, made.width = x.data_ptr(), DTYPES[x.dtype], x.shape[-1]
    made.row = x.stride(0) if x.ndim == 4 else 0
    made.head, made.token = x.stride(-3), x.stride(-2)
    return made


def packed(part: PackedPart, fields: Fields) -> Any:
    """One part of a slab for the kernels."""
    made = loaded().Packed()
    codes = fields.tile[part.codes]
    made.codes, made.tile_bytes = address(codes, torch.uint8), codes.stride(1)
    made.kind, made.bits, made.width = KINDS[part.kind], part.bits, part.width
    made.per_token, made.group, made.middle = part.per == "token", part.group, part.middle
    made.scale = fields.parameter(part.scale)
    if part.zero is not None:
        made.zero = fields.parameter(part.zero)
    if isinstance(part.levels, str):
        table = fields.tables[part.levels]
        made.levels, made.levels_stride = address(table, torch.float32), table.stride(0)
    elif part.levels is not None:
        made.levels = address(part.levels, torch.float32)
    if part.outliers is not None:
        made.sparse = fields.sparse(*part.outliers)
    if part.plane is not None and part.plane[0] in fields.sets:
        made.plane = fields.plane(*part.plane)
    return made


class Fields:
    """The tensors of a slab: `[N, 2, ..]` of tiles, `[N, 64, ..]` of slots, `[M, ..]` of sets by family
    with int32 `[N, 2]` saying which tile uses which, and the layer's tables `[H, ..]`.
    """

    def __init__(
        self,
        tile: Mapping[str, Tensor],
        slot: Mapping[str, Tensor],
        sets: Mapping[str, Mapping[str, Tensor]],
        index: Mapping[str, Tensor],
        tables: Mapping[str, Tensor],
    ):
        self.tile, self.slot, self.sets, self.index, self.tables = tile, slot, sets, index, tables

    def parameter(self, p: Parameter) -> Any:
        made = loaded().Param()
        if p.home == "tile":
            x = self.tile[p.name]
            made.stride = x.stride(1)
        elif p.home == "table":
            x = self.tables[p.name]
            made.stride, made.of_head = x.stride(0), True
        else:
            x = self.sets[p.home][p.name]
            made.stride, made.index = x.stride(0), address(self.index[p.home], torch.int32)
        made.data = address(x, torch.float16)
        return made

    def sparse(self, numbers: str, places: str) -> Any:
        home = self.tile if numbers in self.tile else self.slot
        made = loaded().Sparse()
        made.numbers, made.places = address(home[numbers]), address(home[places])
        made.n, made.dtype = home[numbers].shape[-1], DTYPES[home[numbers].dtype]
        made.wide = home[places].dtype == torch.int16
        return made

    def plane(self, family: str, prefix: str) -> Any:
        fields, made = self.sets[family], loaded().Plane()
        numbers, ids = fields[prefix], fields[f"{prefix}_ids"]
        if not len(numbers):
            return made
        made.numbers, made.ids, made.n = address(numbers), address(ids), ids.shape[-1]
        made.wide, made.index = ids.dtype == torch.int16, address(self.index[family], torch.int32)
        scale = fields.get(f"{prefix}_scale")
        if scale is not None:
            made.scale = address(scale, torch.float16)
        return made


def check_queries(handle: Any, query: Tensor, value_dim: int) -> None:
    """Raise ValueError unless these are queries of this layer."""
    B, H, G, _, D = query.shape
    got, held = (B, H, G, D, value_dim), handle.shape
    if query.device.type != "cpu" or got != held:
        raise ValueError(
            f"queries {tuple(query.shape)} on {query.device} for values of width {value_dim} do not fit a "
            f"layer of (rows, heads, group, key width, value width) = {held}"
        )


def attend(
    handle: Any,
    query: Tensor,
    value_dim: int,
    raw: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries `[B, H, G, Q, D]` over all that a layer was told of: `out [B, H, G, Q, E]` and
    `lse [B, H, G, Q]`, fp32.

    `raw [B, H, G, Q, slots]` takes logits of pages and tail, times log2(e); `sinks [H, G]` are a model's
    learned sinks (see `reference.combine`).
    """
    query = query.float().contiguous()
    shape = query.shape[:-1]
    check_queries(handle, query, value_dim)
    out = torch.empty(*shape, value_dim, dtype=torch.float32, device="cpu")
    lse = torch.empty(shape, dtype=torch.float32, device="cpu")
    where, stride = (0, 0) if raw is None else (raw.data_ptr(), raw.shape[-1])
    sinks = None if sinks is None else sinks.float().contiguous()
    handle.attend(
        query.data_ptr(), shape[3], 0 if sinks is None else sinks.data_ptr(), out.data_ptr(),
        lse.data_ptr(), where, stride, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse

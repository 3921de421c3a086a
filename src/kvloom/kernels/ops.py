"""Which implementation serves a call. `KVLOOM_BACKEND=reference|torch|cpu|triton` forces one.

reference: plain torch that defines every op; torch: its fast CPU attention over decoded pages; cpu: the C++
kernels over packed pages (and torch where a call is not theirs: long queries, a chunk among itself); triton:
the same on NVIDIA GPUs.

A forced backend that cannot serve a call raises with the reason; without force the fastest
backend that can is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from kvloom.kernels import cpu_backend, cpu_encode, mass, reference, torch_cpu, triton_backend

BACKENDS = ("reference", "torch", "cpu", "triton")
_BLOCK_ELEMENTS = 1 << 24  # logits held at once by the matmul path: 64 MiB in fp32


@cache
def forced_backend() -> str | None:
    """The backend demanded by `KVLOOM_BACKEND`, or None. Raises ValueError on an unknown name.

    Read once; `forced_backend.cache_clear()` makes a later change of the environment count.
    """
    name = os.environ.get("KVLOOM_BACKEND")
    if name is not None and name not in BACKENDS:
        raise ValueError(f"KVLOOM_BACKEND={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    return name


def cpu_refusal() -> str | None:
    """The reason why the C++ kernels may not be used at all, or None."""
    forced = forced_backend()
    if forced in ("reference", "torch", "triton"):
        return f"KVLOOM_BACKEND={forced}"
    if cpu_backend.module() is None:
        return "kvloom was built without its CPU kernels"
    return None


def cpu_why_not(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The reason why the C++ kernels cannot take keys or values like these, or None."""
    if device.type != "cpu":
        return f"the cache is on {device.type}"
    if width > cpu_backend.WIDEST:
        return f"heads are wider than {cpu_backend.WIDEST}"
    if dtype not in cpu_backend.DTYPES:
        return f"the model's dtype is {dtype}"
    return cpu_refusal()


def triton_why_not(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The reason why the Triton kernels cannot take keys or values like these, or None."""
    forced = forced_backend()
    if forced not in (None, "triton"):
        return f"KVLOOM_BACKEND={forced}"
    return triton_backend.why_not(device, dtype, width, forced == "triton")


def encoder(x: Tensor) -> Callable[..., None] | None:
    """What lays pages `x [N, 64, W]` on uniform grids, as `cpu_encode.by_ranges`; None: torch must."""
    if cpu_encodes(x):
        return cpu_encode.by_ranges
    return triton_backend.encode if triton_why_not(x.device, x.dtype, x.shape[2]) is None else None


def cpu_encodes(x: Tensor) -> bool:
    """Whether `cpu_encode` takes pages `x [N, 64, W]`."""
    return cpu_why_not(x.device, x.dtype, x.shape[2]) is None


def turns(encode: Callable[..., None] | None) -> bool:
    """Whether what `encoder` returned takes a rotation before it (`turned`)."""
    return encode is triton_backend.encode


def mover(device: torch.device, width: int) -> Callable[..., None] | None:
    """What moves packed codes to other tiles, as `triton_backend.move_codes`; None: torch must."""
    served = triton_why_not(device, torch.float32, width) is None
    return triton_backend.move_codes if served else None


def join_centroids(
    slots: Tensor,
    at: Tensor,
    rows: Tensor,
    mass: Tensor,
    columns: int,
    ema: float | None = None,
) -> Tensor:
    """See `reference.join_centroids`; its torch is what CPUs run."""
    served = triton_why_not(slots.device, slots.dtype, 0) is None
    join = triton_backend.join_centroids if served else reference.join_centroids
    return join(slots, at, rows, mass, columns, ema)


def serving() -> str:
    """What attends over pages on a CPU: `"cpu avx2"`, `"cpu vnni fast"`, `"torch"`, `"reference"`."""
    if cpu_refusal() is not None:
        return forced_backend() or "torch"
    return f"cpu {cpu_backend.isa()} {cpu_backend.mode_name()}".removesuffix(" default")


def partial_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.partial_attention`; long queries are served in blocks."""
    if _torch_refusal(query, keys, values, softcap) is None:
        if mask is None or mask.shape[-2] == 1:
            return torch_cpu.partial_attention(
                query, keys, values, scale=scale, bias=bias, mask=mask
            )
        # a mask per query is spread over the group's heads: only for a block of queries at a time
        serve = partial(torch_cpu.partial_attention, scale=scale, bias=bias)
    else:
        serve = partial(reference.partial_attention, scale=scale, softcap=softcap, bias=bias)
    return _blocked(serve, query, keys, values, mask)


def causal_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A chunk's attention to itself. `mask` `[B, 1, Q, Q]` (True: attend) replaces plain causality."""
    if mask is None and _torch_refusal(query, keys, values, softcap) is None:
        return torch_cpu.causal_attention(query, keys, values, scale=scale)
    if mask is None:
        mask = causal_mask(query.shape[-2], query.device)
    return partial_attention(query, keys, values, scale=scale, softcap=softcap, mask=mask)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    voters: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """See `mass.attention_mass`; accumulated in query blocks, no Q x S matrix is kept."""
    if forced_backend() != "reference":
        return mass.attention_mass(
            query, keys, lse, scale=scale, softcap=softcap, bias=bias, mask=mask, voters=voters,
            causal=causal,
        )  # fmt: skip
    mask = causal_mask(keys.shape[-2], keys.device) if causal else mask
    return reference.attention_mass(
        query, keys, lse, scale=scale, softcap=softcap, bias=bias, mask=mask, voters=voters
    )


def causal_mask(length: int, device: torch.device) -> Tensor:
    """`[1, 1, length, length]`, True where a query may look."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


combine = reference.combine


def combine_outputs(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`reference.combine` without its log-sum-exp, in fewer steps."""
    if len(parts) == 1:
        return parts[0][0]
    if len(parts) == 2:
        (a, lse_a), (b, lse_b) = parts
        share = torch.sigmoid(lse_b - lse_a).nan_to_num_(0.0)  # -inf on both sides: nothing seen
        return torch.lerp(a.float(), b.float(), share[..., None])
    # torch.softmax would start a parallel region even for these few numbers
    lses = torch.stack([lse for _, lse in parts])
    weights = torch.exp(lses - lses.amax(0).clamp_min(torch.finfo(torch.float32).min))
    weights = weights / weights.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    outs = torch.stack([out.float() for out, _ in parts])
    return (outs * weights[..., None]).sum(0)


def _torch_refusal(
    query: Tensor, keys: Tensor, values: Tensor, softcap: float | None
) -> str | None:
    forced = forced_backend()
    if forced == "reference":
        return "KVLOOM_BACKEND=reference"
    reason = torch_cpu.why_not(query, keys, values, softcap)
    if reason is not None and forced == "torch" and keys.shape[-2] > 0:
        raise RuntimeError(f"KVLOOM_BACKEND=torch cannot serve this call: {reason}")
    return reason


def _queries(mask: Tensor | None, part: slice) -> Tensor | None:
    """The rows of a mask for a block of queries; one row serves all."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]


def _block(query: Tensor, keys: Tensor) -> int:
    rows = keys.shape[0] * keys.shape[1] * query.shape[2] * max(1, keys.shape[-2])
    return max(1, _BLOCK_ELEMENTS // max(1, rows))


def _blocked(
    serve: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`serve` for blocks of queries, so that no large Q x S tensor is ever made."""
    step = _block(query, keys)
    parts = [
        serve(query[..., i : i + step, :], keys, values, mask=_queries(mask, slice(i, i + step)))
        for i in range(0, query.shape[-2], step)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)

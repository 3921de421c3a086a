"""`kvloom::paged_attention`: attention over pages as an operator that torch.compile and export can see.

    out, lse = torch.ops.kvloom.paged_attention(query, layer, value_dim)

A layer is named by the number that `name` gave it; its pages are not arguments, since there are many and
their number grows. So the operator must not be moved across what changes the layer, and graphs that hold it
must not outlive it. Eager code calls `cpu_backend.attend`, which costs less per call.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvloom.kernels import cpu_backend

_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def name(handle: Any) -> int:
    """The number by which the operator knows a layer."""
    _LAYERS[id(handle)] = handle
    return id(handle)


@torch.library.custom_op("kvloom::paged_attention", mutates_args=())
def paged_attention(query: Tensor, layer: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Queries `[B, H, G, Q, D]` -> `(out [B, H, G, Q, E], lse [B, H, G, Q])`, fp32.

    Raises ValueError if there is no such layer (any more).
    """
    handle = _LAYERS.get(layer)
    if handle is None:
        raise ValueError(f"layer {layer} is not, or no longer, one whose pages kernels can read")
    return cpu_backend.attend(handle, query, value_dim)


@paged_attention.register_fake
def _(query: Tensor, layer: int, value_dim: int) -> tuple[Tensor, Tensor]:
    shape = query.shape[:-1]
    return (
        query.new_empty(*shape, value_dim, dtype=torch.float32),
        query.new_empty(shape, dtype=torch.float32),
    )

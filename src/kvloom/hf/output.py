"""The part of a layer's output projection that reads each query head's result."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvloom.hf.rope import attention_modules

_NAMES = ("o_proj", "dense", "out_proj", "wo")


def output_weight_of(model: nn.Module, layer: int, kv_heads: int, width: int) -> Tensor:
    """`[H, G, E, hidden]`, a view of the model's weight: head (h, g) adds `out @ weight[h, g]`.

    Raises ValueError if the attention module has no plain linear output projection.
    """
    module = attention_modules(model)[layer]
    found = next((getattr(module, n) for n in _NAMES if hasattr(module, n)), None)
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"{type(module).__name__} has no plain output projection (looked for {_NAMES}): "
            "methods that weigh values by it cannot be used"
        )
    hidden, columns = weight.shape
    if columns % (kv_heads * width):
        raise ValueError(
            f"{type(module).__name__}: an output projection of {columns} columns does not divide "
            f"into {kv_heads} KV heads of width {width}"
        )
    with torch.no_grad():
        return weight.detach().t().reshape(kv_heads, -1, width, hidden)

"""What each attention layer of a Llama was given and gave back, to replay it in plain loops."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass
class Seen:
    """One forward of one layer: `query [B, H, G, Q, D]`, `keys`, `values [B, H, Q, D]`, `out`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor


class Recorder:
    """Records every attention layer while a model runs; queries and keys are rotated."""

    def __init__(self, model):
        self.layers: list[list[Seen]] = [[] for _ in model.model.layers]
        self._inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._before, with_kwargs=True)
            layer.self_attn.register_forward_hook(self._after)

    def _before(self, module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._inputs[module.layer_idx] = hidden, kwargs["position_embeddings"]

    def _after(self, module, args, output):
        hidden, (cos, sin) = self._inputs.pop(module.layer_idx)
        B, Q, _ = hidden.shape
        D = module.head_dim

        def heads(projected):
            return projected.view(B, Q, -1, D).transpose(1, 2).double()

        def rotated(x):
            a, b = x[..., : D // 2], x[..., D // 2 :]
            turned = torch.cat([-b, a], -1)
            return x * cos[:, None].double() + turned * sin[:, None].double()

        keys, values = rotated(heads(module.k_proj(hidden))), heads(module.v_proj(hidden))
        query = rotated(heads(module.q_proj(hidden)))
        H = keys.shape[1]
        query = query.view(B, H, query.shape[1] // H, Q, D)
        self.layers[module.layer_idx].append(Seen(query, keys, values, output[0]))


def columns_of(mask: Tensor | None, start: int, stop: int, row: int) -> list[int]:
    """Indices, within one forward, of the valid tokens of a row."""
    if mask is None:
        return list(range(stop - start))
    return [i for i in range(stop - start) if mask[row, start + i]]


def forward_edges(length: int, prefill: int, chunk: int) -> list[int]:
    """A prefill, a chunk, then one token at a time."""
    return [0, prefill, prefill + chunk, *range(prefill + chunk + 1, length + 1)]


def run(model, cache, ids: Tensor, edges: list[int], mask: Tensor | None = None):
    """Run the forwards between `edges`; yields `(start, stop)` after each."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)
    for start, stop in pairwise(edges):
        extra = {}
        if mask is not None:
            extra["attention_mask"] = mask[:, :stop]
            extra["position_ids"] = positions[:, start:stop]
        model(ids[:, start:stop], past_key_values=cache, **extra)
        yield start, stop

"""What a model caches for a text, before rotation, and the gradient of its loss with respect to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvloom.hf.rope import rope_of
from kvloom.hf.sliding import layer_kinds

SCALE = 2.0**10  # of the loss while it runs backward: in fp16, gradients of a mean vanish


@dataclass
class Cached:
    """One full-attention layer's keys (pre-RoPE, fp32) and values for T tokens, `[H, T, D]`.

    `key_grads`, `value_grads`: of the loss, or None.
    """

    keys: Tensor
    values: Tensor
    key_grads: Tensor | None = None
    value_grads: Tensor | None = None


class _Recorder(DynamicCache):
    """Keeps what full-attention layers are given; keys pass through un-rotation and rotation, so
    that the pre-RoPE ones are part of autograd's graph.
    """

    def __init__(self, model: nn.Module):
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        super().__init__(config=config)
        kinds, _ = layer_kinds(config)
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.ropes = {i: rope_of(model, i) for i in full}
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `Cache`."""
        rope = self.ropes.get(layer_idx)
        if rope is not None:
            positions = torch.arange(key_states.shape[2], device=key_states.device)
            keys = rope.unrotate(key_states, positions)
            self.held[layer_idx] = keys, value_states
            if keys.requires_grad:
                keys.retain_grad()
                value_states.retain_grad()
                key_states = rope.rotate(keys, positions).to(key_states.dtype)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def record(model: Any, ids: Tensor, gradients: bool = False) -> list[Cached]:
    """What the full-attention layers cache for `ids [T]`, in order.

    With `gradients`, also those of the mean next-token loss, by one real backward pass; the weights'
    own gradients are not computed. Raises ValueError if the model's rotation is not known.
    """
    recorder, ids = _Recorder(model), ids.to(model.device)[None]
    with _frozen(model), torch.set_grad_enabled(gradients):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(gradients)
        keep = 0 if gradients else 1  # of the logits: all, or as few as can be
        out = model(
            inputs_embeds=embedded, past_key_values=recorder, use_cache=True, logits_to_keep=keep
        )
        if gradients:
            logits = out.logits[0, :-1].float()
            (SCALE * nn.functional.cross_entropy(logits, ids[0, 1:])).backward()
    return [_cached(*recorder.held[i]) for i in recorder.ropes]


def _cached(keys: Tensor, values: Tensor) -> Cached:
    def plain(x: Tensor) -> Tensor:
        return x[0].detach().float()

    if keys.grad is None or values.grad is None:
        return Cached(plain(keys), plain(values))
    grads = (plain(x) / SCALE for x in (keys.grad, values.grad))
    return Cached(plain(keys), plain(values), *grads)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights, within."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)

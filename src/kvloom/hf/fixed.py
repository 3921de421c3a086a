"""A compressed cache that decodes in fixed memory, for CUDA graphs: see `kvloom.core.fixed`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvloom.core.attend import Call
from kvloom.core.fixed import FixedLayer, fixed_step
from kvloom.hf.attention import Handle
from kvloom.hf.cache import CompressedCache
from kvloom.hf.layer import CompressedLayer


class FixedLayerOf(CacheLayerMixin):
    """One layer: `update` takes the new token, `attend` is the step."""

    is_sliding = False
    is_compileable = True

    def __init__(self, layer: CompressedLayer, steps: int):
        super().__init__()
        assert layer.store is not None
        self.inner, self.fixed = layer, FixedLayer(layer.store, steps)
        self.is_initialized = True
        self.staged: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it was made from a layer that is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.staged = (key_states, value_states)
        return Handle(self), Handle(self)  # type: ignore[arg-type]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """See `CompressedLayer.attend`; one token per row. Raises ValueError on anything else."""
        assert self.staged is not None
        keys, values = self.staged
        B, heads, Q, D = query.shape
        if Q != 1:
            raise ValueError(f"a step in fixed memory takes one token, not {Q}")
        H, G = keys.shape[1], heads // keys.shape[1]
        grouped = query.reshape(B, H, G, 1, D)
        logits = None if sink_logits is None else sink_logits.reshape(H, G)
        if position_ids is not None:
            position_ids = position_ids.expand(B, 1)
        if torch.compiler.is_compiling():
            out = fixed_step(
                grouped, keys, values, position_ids, logits, self.fixed.written(), scale, softcap,
                self.fixed.number,
            )  # fmt: skip
        else:
            call = Call(grouped, scale, softcap, logits, positions=position_ids)
            out = self.fixed.step(call, keys, values)
        return out.reshape(B, heads, 1, -1).to(query.dtype)

    def get_seq_length(self) -> int:
        return self.inner.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.inner.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class FixedCache(Cache):
    """A prefilled `CompressedCache` whose steps can be captured in a CUDA graph.

    Give the model `position_ids` as a tensor, since the number of tokens is not counted on the way; call
    `flush` every `steps` tokens at the latest, outside of the graph, and `flush(0)` after rehearsals, which
    are forgotten. Rows of equal length only.
    """

    def __init__(self, cache: CompressedCache, steps: int = 64):
        """Raises ValueError if the recipe, or a layer, cannot decode in fixed memory."""
        made = []
        for layer in cache.layers:
            if not isinstance(layer, CompressedLayer) or layer.store is None:
                raise ValueError(
                    "every layer must be compressed, and prefilled, to decode in fixed memory"
                )
            made.append(FixedLayerOf(layer, steps))
        super().__init__(layers=list(made))
        self.cache, self.steps, self.fixed = cache, steps, made

    def flush(self, tokens: int) -> None:
        """Hand the `tokens` steps since the last flush to the recipe's policies; 0: forget them."""
        for layer in self.fixed:
            assert layer.inner.store is not None
            start, B = layer.inner.columns, len(layer.inner.store.seen)
            positions = torch.arange(start, start + tokens, device=layer.fixed.store.device)
            layer.fixed.flush(positions.expand(B, -1))
            layer.inner.columns += tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of what its steps need."""
        own = sum(x.nbytes for layer in self.fixed for x in layer.fixed.tensors())
        return self.cache.nbytes + own

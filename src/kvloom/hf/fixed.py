"""A compressed cache that decodes in fixed memory, for CUDA graphs: see `kvloom.core.fixed`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kvloom.core.attend import Call
from kvloom.core.fixed import FixedLayer, fixed_step
from kvloom.core.fixed_window import FixedWindow, fixed_window_step
from kvloom.hf.attention import Handle
from kvloom.hf.cache import CompressedCache
from kvloom.hf.layer import CompressedLayer
from kvloom.hf.sliding import release


class _Fixed(CacheLayerMixin):
    """One layer: `update` takes the new token, `attend` is the step."""

    is_compileable = True

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.staged: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def _step(self, call: Call, key: Tensor, value: Tensor) -> Tensor:
        """The new token's attention, `[B, H, G, 1, E]`."""

    @abstractmethod
    def flush(self, tokens: int) -> None:
        """Hand the newest tokens to the layer that this was made from; 0: forget them."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What steps need beside that layer."""

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
        logits = None if sink_logits is None else sink_logits.reshape(H, G)
        if position_ids is not None:
            position_ids = position_ids.expand(B, 1)
        call = Call(query.reshape(B, H, G, 1, D), scale, softcap, logits, positions=position_ids)
        out = self._step(call, keys, values)
        return out.reshape(B, heads, 1, -1).to(query.dtype)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class FixedLayerOf(_Fixed):
    """A compressed layer."""

    is_sliding = False

    def __init__(self, layer: CompressedLayer, steps: int):
        super().__init__()
        assert layer.store is not None
        self.inner, self.fixed = layer, FixedLayer(layer.store, steps)

    def _step(self, call: Call, key: Tensor, value: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.fixed.step(call, key, value)
        return fixed_step(
            call.query, key, value, call.positions, call.sink_logits, self.fixed.written(),
            call.scale, call.softcap, self.fixed.number,
        )  # fmt: skip

    def flush(self, tokens: int) -> None:
        start, store = self.inner.columns, self.fixed.store
        positions = torch.arange(start, start + tokens, device=store.device)
        self.fixed.flush(positions.expand(len(store.seen), -1))
        self.inner.columns += tokens

    def tensors(self) -> list[Tensor]:
        return self.fixed.tensors()

    def get_seq_length(self) -> int:
        return self.inner.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.inner.columns


class FixedWindowOf(_Fixed):
    """A layer that keeps a sliding window, which is transformers' own."""

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer):
        super().__init__()
        self.inner = layer
        self.window = FixedWindow(*self._held(), layer.sliding_window)
        self.flush(0)

    def _held(self) -> tuple[Tensor, Tensor]:
        keys, values = self.inner.keys, self.inner.values
        assert keys is not None and values is not None
        return keys, values

    def _step(self, call: Call, key: Tensor, value: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.window.step(call, key, value)
        return fixed_window_step(
            call.query,
            key,
            value,
            call.sink_logits,
            *self.window.tensors(),
            call.scale,
            call.softcap,
        )

    def flush(self, tokens: int) -> None:
        if tokens:
            start = self.inner.cumulative_length
            self.inner.update(*self.window.newest(start, tokens))
            self.inner.cumulative_length = start + tokens
            release(self.inner)
        self.window.refresh(*self._held(), self.inner.cumulative_length)

    def tensors(self) -> list[Tensor]:
        return self.window.tensors()

    def get_seq_length(self) -> int:
        return self.inner.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.inner.cumulative_length


class FixedCache(Cache):
    """A prefilled `CompressedCache` whose steps can be captured in a CUDA graph.

    Give the model `position_ids` as a tensor, since the number of tokens is not counted on the way; call
    `flush` every `steps` tokens at the latest, outside of the graph, and `flush(0)` after rehearsals, which
    are forgotten. Rows of equal length only.
    """

    def __init__(self, cache: CompressedCache, steps: int = 64):
        """Raises ValueError if the recipe, or a layer, cannot decode in fixed memory."""
        made: list[FixedLayerOf | FixedWindowOf] = []
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer) and layer.store is not None:
                made.append(FixedLayerOf(layer, steps))
            elif isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
                made.append(FixedWindowOf(layer))
            else:
                raise ValueError(
                    "to decode in fixed memory every layer must be prefilled, and compressed or a sliding "
                    f"window, not {type(layer).__name__}"
                )
        super().__init__(layers=list(made))
        self.cache, self.steps, self.fixed = cache, steps, made

    def flush(self, tokens: int) -> None:
        """Hand the `tokens` steps since the last flush to the recipe's policies; 0: forget them."""
        for layer in self.fixed:
            layer.flush(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and of what its steps need."""
        return self.cache.nbytes + sum(x.nbytes for layer in self.fixed for x in layer.tensors())

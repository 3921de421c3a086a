"""A compressed cache that shows one layer as its attention sees it: for those who study a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvloom.core.attend import Call
from kvloom.core.budget import Budget
from kvloom.core.forward import Forward
from kvloom.core.recipe import Recipe
from kvloom.core.store import LayerStore
from kvloom.hf.cache import CompressedCache
from kvloom.hf.layer import CompressedLayer

Watcher = Callable[[LayerStore, Forward], None]


class ObservedCache(CompressedCache):
    """Tells a watcher of every forward of one layer, after its attention and before its commit.

    At that moment the store is what the queries of `forward.call` saw; the new tokens are in
    `forward.block`, and in the tail as well if `forward.in_tail`. A watcher only looks.

    Args:
        model, recipe, budget: as for `CompressedCache`.
        layer: the model's index of the layer. watcher: told of `(store, forward)`.

    Raises ValueError as `CompressedCache` does, or if there is no such layer, or it is not compressed.
    """

    def __init__(
        self,
        model: nn.Module | Any,
        recipe: str | Recipe,
        budget: str | Budget | None,
        layer: int,
        watcher: Watcher,
    ):
        super().__init__(model, recipe, budget, track_positions=True)
        if not 0 <= layer < len(self.layers):
            raise ValueError(
                f"layer {layer} is out of range: the model has layers 0 to {len(self.layers) - 1}"
            )
        held = self.layers[layer]
        if not isinstance(held, CompressedLayer):
            full = [x.layer_idx for x in self.compressed]
            raise ValueError(
                f"layer {layer} is {type(held).__name__}, which is not compressed; choose one of {full}"
            )
        self.layers[layer] = _ObservedLayer(held, watcher)


class _ObservedLayer(CompressedLayer):
    def __init__(self, layer: CompressedLayer, watcher: Watcher):
        super().__init__(layer.context, layer.index, layer.layer_idx)
        self.watcher = watcher

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        assert self.store is not None
        self.store = _ObservedStore(self.store.plan, key_states, value_states, self.watcher)


class _ObservedStore(LayerStore):
    def __init__(self, plan: Any, keys: Tensor, values: Tensor, watcher: Watcher):
        super().__init__(plan, keys, values)
        self.watcher = watcher

    def forward(
        self, keys: Tensor, values: Tensor, call: Call, columns: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Forward]:
        out, forward = super().forward(keys, values, call, columns, positions)
        self._show(forward)
        return out, forward

    def forward_token(
        self, keys: Tensor, values: Tensor, call: Call, positions: Tensor
    ) -> tuple[Tensor, Forward]:
        out, forward = super().forward_token(keys, values, call, positions)
        self._show(forward)
        return out, forward

    def _show(self, forward: Forward) -> None:
        with torch.inference_mode():
            self.watcher(self, forward)

"""`CompressedCache`: one cache that a transformers model uses as it uses `DynamicCache`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
)

from kvloom.core.budget import Budget
from kvloom.core.policy import Policy
from kvloom.core.recipe import Recipe
from kvloom.core.view import kept_positions
from kvloom.hf.attention import Handle, announce
from kvloom.hf.context import Context, Host
from kvloom.hf.layer import CompressedLayer
from kvloom.hf.model import attach, check_dense, plan_for
from kvloom.hf.sliding import layer_kinds, release
from kvloom.hf.stats import CacheStats, collect_stats, unique_nbytes


class CompressedCache(Cache):
    """A KV cache that evicts, merges and quantizes by a recipe, within a budget.

    Works with `model.generate` and plain `model(...)`: padded batches, chunked prefill, beams,
    several turns, copies. Full-attention layers are compressed; sliding and other layers keep
    transformers' own.

    Args:
        model: the model, or its config. With a model, its attention implementation is set to
            `"kvloom"`, which reads compressed entries in place and serves everything else by SDPA.
        recipe: text such as `"h2o | int4"`, a preset's name, a policy or a `Recipe`.
        budget: `"512MiB"` (everything, all layers), `"1024tok"` (entries per KV head per layer) or
            `"25%"` (of a 16-bit dense cache for the tokens seen so far). A recipe that evicts
            needs one unless it states its own size; one that does not evict takes none.
        attention: `"auto"`, or `"dense"` to hand dense tensors to the model's own attention, for
            models that cannot read compressed entries (key/value-only recipes).
        track_positions: keep every entry's original position even if no policy needs it.

    Raises:
        ValueError: on an unknown method or parameter, a budget below `floor()`, a recipe or model
            that cannot work together; the message restates the input and the rule.
    """

    def __init__(
        self,
        model: nn.Module | Any,
        recipe: str | Policy | Recipe = "none",
        budget: str | int | Budget | None = None,
        *,
        attention: str = "auto",
        track_positions: bool = False,
    ):
        self.recipe = Recipe.parse(recipe)
        self.budget = None if budget is None else Budget.parse(budget)
        is_model = isinstance(model, nn.Module)
        source: Any = model.config if is_model else model
        config = source.get_text_config(decoder=True)
        host = Host(model if is_model else None, config)
        kinds, kwargs = layer_kinds(config)
        compressed = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.context = Context(
            host, self.recipe, self.budget, len(compressed), track_positions=track_positions
        )
        plan = plan_for(config, self.recipe, self.budget, len(compressed))
        self.context.other_elements = plan.other_elements
        if is_model:
            self.context.dense = attach(model, config, self.recipe, attention)
        elif attention == "dense" or not host.reads_handles:
            check_dense(self.recipe, "the cache was constructed from a config")
        self.context.dense |= attention == "dense"
        layers = [
            CompressedLayer(self.context, compressed.index(i), i)
            if kind == "full_attention"
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**extra)
            for i, (kind, extra) in enumerate(zip(kinds, kwargs, strict=True))
        ]
        super().__init__(layers=layers)
        attending = [i for i, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
        self._first, self.context.last = attending[0], attending[-1]
        self._broken: str | None = None
        self._handles_expected = self._wants_handles()

    # -- one forward -----------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Stage the new tokens of one layer; on an error the whole forward is taken back."""
        if layer_idx == self._first:
            self._open()
        try:
            self.context.check_finite(key_states.detach(), value_states.detach())
            result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            self.roll_back()
            raise
        if not isinstance(self.layers[layer_idx], CompressedLayer):
            release(self.layers[layer_idx])
        if layer_idx == self.context.last and not isinstance(result[0], Handle):
            self.context.end_forward()
        return result

    def _open(self) -> None:
        """A forward begins; what an earlier one left behind when it broke off is taken back."""
        if self.context.opened_at is not None:
            self.roll_back()
        if self._broken is not None:
            raise RuntimeError(f"{self._broken}; call reset()")
        self.context.handles = self._wants_handles()
        if self._handles_expected and not self.context.handles:
            kind = self.context.host.config._attn_implementation
            check_dense(self.recipe, f"the model's attention was switched to {kind!r} afterwards")
        self.context.opened_at = super().get_seq_length()

    def _wants_handles(self) -> bool:
        return self.context.host.reads_handles and not self.context.dense

    def roll_back(self) -> None:
        """Take back a forward that broke off, so that the cache is as before it."""
        start, self.context.opened_at = self.context.opened_at, None
        if start is None:
            return
        self.context.fresh.clear()
        self._take_back(start)
        self.context.settle()

    def _take_back(self, start: int) -> None:
        """All layers as they were at length `start`, or the cache is known to be broken."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                whole = layer.abort(start)
            else:
                length = getattr(layer, "get_seq_length", None)  # linear layers have none
                whole = length is not None and length() == start
            if not whole:
                self._broken = (
                    f"a forward broke off after layer {index} had compressed or slid past it; the "
                    "cache no longer holds one consistent sequence"
                )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far (columns, padding included), never the physical length."""
        if layer_idx == 0 and self.context.opened_at is not None:
            self.roll_back()  # asked between forwards, so the last one never ended
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See `Cache`; also tells our mask function whose mask comes next."""
        self.context.handles = self._wants_handles()
        if self.context.handles and isinstance(self.layers[layer_idx], CompressedLayer):
            announce(self)
        return super().get_mask_sizes(query_length, layer_idx)

    def valid_tokens(self) -> Tensor | None:
        """Valid tokens that each row has had, host int64 `[B]`; None before the first."""
        first = self.compressed[0] if self.compressed else None
        return None if first is None else first.valid_tokens()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (see `CompressedLayer.crop`): in all layers, or in none."""
        if self.context.opened_at is not None:  # the last forward broke off
            self.roll_back()
        if self._broken is not None:
            raise RuntimeError(f"{self._broken}; call reset()")
        amount = int(tokens_to_remove)
        n = -amount if amount <= 0 else max(0, super().get_seq_length() - amount)
        for layer in self.compressed:
            layer.check_crop(n)
        ours = self.compressed
        for other in self.layers:  # first the ones that may yet refuse
            if other not in ours:
                other.crop(tokens_to_remove)  # type: ignore[union-attr]
        for layer in ours:
            layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        super().reset()
        self._broken = self.context.opened_at = self.context.columns = None
        self.context.masked_at = -1
        self.context.forget_bad()

    # -- sizes -----------------------------------------------------------------------------------

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that kvloom compresses."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all live tensor storages, each counted once; everything is included."""
        return unique_nbytes(self.layers)

    def floor(self, rows: int = 1) -> int:
        """The least bytes that this recipe needs for `rows` rows (a fixed budget's lower bound)."""
        plan = plan_for(self.context.host.config, self.recipe, self.budget, self.context.layers)
        return rows * plan.floor()

    def ceiling(self) -> int | None:
        """Bytes that the cache holds at most after a commit, now; None if nothing bounds it.

        Layers that kvloom does not compress (sliding windows) count with what they hold.
        """
        stores = [layer.store for layer in self.compressed if layer.store is not None]
        if not stores or not all(store.plan.bounded for store in stores):
            return None
        others = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        return sum(store.ceiling() for store in stores) + unique_nbytes(others)

    def stats(self) -> CacheStats:
        """Bytes by part, bits, ratios and counts; waits for the device."""
        self.context.raise_bad()
        return collect_stats(self)

    def positions(self, layer_idx: int = 0) -> list[list[list[int]]]:
        """Original positions of the entries kept, `[row][KV head]`, in order; sinks included.

        Needs `track_positions=True` or a recipe that keeps positions.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            raise ValueError(
                f"layer {layer_idx} is {type(layer).__name__}, which is not compressed"
            )
        if layer.store is None:
            return []
        return kept_positions(layer.store)

    def __str__(self) -> str:
        return self.stats().table()

    def __repr__(self) -> str:
        size = f", budget={str(self.budget)!r}" if self.budget else ""
        return f"CompressedCache({str(self.recipe)!r}{size})"

"""`CompressedLayer`: one full-attention layer of a `CompressedCache`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvloom.core import fit
from kvloom.core.attend import Call
from kvloom.core.forward import Forward
from kvloom.core.plan import LayerPlan
from kvloom.core.schedule import Lazy
from kvloom.core.store import LayerStore
from kvloom.core.view import dense_of
from kvloom.formats.dense import Dense
from kvloom.hf.attention import Handle
from kvloom.hf.context import Context
from kvloom.hf.output import output_weight_of
from kvloom.hf.rope import rope_of


class CompressedLayer(CacheLayerMixin):
    """Stages the tokens of a forward in `update`, attends and commits in `attend`.

    Where the model cannot read handles, `update` commits at once and returns dense tensors,
    right-aligned, so that transformers' own masks fit.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, context: Context, index: int, layer_idx: int):
        super().__init__()
        self.context, self.index, self.layer_idx = context, index, layer_idx
        self.store: LayerStore | None = None
        self.columns = 0
        self.padded_until = 0  # columns up to the last one that some row had as padding
        self.record_past = False
        self.staged: tuple[Tensor, Tensor] | None = None
        self.pending: Forward | None = None

    # -- life ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.store = LayerStore(self._plan(key_states, value_states), key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _plan(self, keys: Tensor, values: Tensor) -> LayerPlan:
        context, recipe = self.context, self.context.recipe
        H, (D, E) = keys.shape[1], (keys.shape[3], values.shape[3])
        plan = LayerPlan(
            recipe, context.budget, recipe.format or Dense(), self.index, context.layers,
            H, D, E, keys.dtype,
            track_positions=context.track_positions,
            group=max(1, context.host.config.num_attention_heads // H),
            other_elements=context.other_elements,
        )  # fmt: skip
        fit.check_rows(plan, keys.shape[0])
        weighs = "output_weight" in recipe.needs
        if not (plan.needs_rope or weighs):
            return plan
        model = context.host.model
        if model is None:
            raise ValueError(f"recipe '{recipe}' needs the model's own weights: construct the "
                             "cache from the model, not from its config")  # fmt: skip
        if plan.needs_rope:
            rope = rope_of(model, self.layer_idx).to(keys.device)
            plan = dataclasses.replace(plan, rope=rope)
        if weighs:
            weight = output_weight_of(model, self.layer_idx, H, E)
            plan = dataclasses.replace(plan, output_weight=weight)
        return plan

    def reset(self) -> None:
        self.store, self.staged, self.pending = None, None, None
        self.columns, self.padded_until = 0, 0
        self.record_past, self.is_initialized = False, False

    # -- one forward -----------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        keys, values = key_states.detach(), value_states.detach()
        if self.store is None:
            self.lazy_initialization(keys, values)
        self._check_shapes(keys, values)
        if self.pending is not None:  # nobody cropped: assisted decoding is over
            self.record_past = False
            self._accept_pending()
        self.columns += keys.shape[2]
        if self.context.handles:
            self.staged = (keys, values)
            return Handle(self), Handle(self)
        return self._update_dense(keys, values)

    def _check_shapes(self, keys: Tensor, values: Tensor) -> None:
        assert self.store is not None
        plan, rows = self.store.plan, len(self.store.seen)
        got = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        held = (rows, plan.heads, plan.key_dim, plan.value_dim, plan.dtype)
        if got != held:
            raise ValueError(
                f"layer {self.layer_idx} holds (rows, heads, key width, value width, dtype) = {held} "
                f"but gets {got}: a cache serves one model and one batch; reset() it or make another"
            )

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
        """Attention `[B, heads, Q, E]` of the staged tokens over the cache; then commit.

        Gradients do not flow through a cache.
        """
        if module.training and torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError(
                "a compressed cache is for inference: call model.eval(), or train without a cache"
            )
        query = query.detach()
        self.context.host.check(module)
        if self.staged is None or self.store is None:
            raise RuntimeError(f"layer {self.layer_idx} is read before it is updated")
        keys, values = self.staged
        B, heads, Q, D = query.shape
        H = keys.shape[1]
        call = Call(query.reshape(B, H, heads // H, Q, D), scale, softcap)
        if sink_logits is not None:
            call.sink_logits = sink_logits.reshape(H, heads // H)
        seen = self.columns - Q
        columns = self.context.columns_at(seen)
        columns = self._note_padding(columns, seen, keys.device)
        self._set_masks(call, mask, seen, columns)
        positions = self._positions(position_ids, B, Q, keys.device)

        simple = Q == 1 and columns is None and not self.record_past and self.store.takes_token
        if simple and call.past_mask is None:
            out, forward = self.store.forward_token(keys, values, call, positions)
        else:
            out, forward = self.store.forward(keys, values, call, columns, positions)
        self.staged = None  # from here on the tokens are in
        if self.record_past:
            self.pending = forward
        else:
            self._commit(self.store, forward)
        if self.layer_idx == self.context.last:
            self.context.end_forward()
        return out.reshape(B, heads, Q, -1).to(query.dtype)

    def _set_masks(
        self, call: Call, mask: Tensor | None, seen: int, columns: Tensor | None
    ) -> None:
        """Sort a mask into its parts: new x new from our mask function, or a user's own 4D mask."""
        Q = call.query.shape[3]
        if columns is not None:
            call.voters = columns
        if mask is None:
            return
        mask = _as_bool(mask)
        if self.context.masked_at == seen:
            call.new_mask = mask[..., -Q:]
            return
        if self.context.recipe.evicts or self.store is None or self.store.sinks is not None:
            raise ValueError(
                f"a 4D attention mask {tuple(mask.shape)} addresses every column, but the recipe "
                f"'{self.context.recipe}' evicts entries: pass a 2D mask, or a recipe without eviction"
            )
        if mask.shape[-1] != seen + Q:
            raise ValueError(
                f"the 4D attention mask has {mask.shape[-1]} columns, but the cache has seen {seen} "
                f"tokens and gets {Q} more: pass all {seen + Q} columns"
            )
        holes = any(slab.holes for slab in self.store.pool.slabs)
        if holes or not bool((self.store.stored == seen).all()):
            raise ValueError(
                f"a 4D attention mask {tuple(mask.shape)} addresses every column, but padded or cropped "
                "columns are no longer in the cache: use a 2D mask throughout"
            )
        call.new_mask = mask[..., seen:]
        call.past_mask = mask[..., :seen] if seen else None

    def _positions(
        self, position_ids: Tensor | None, rows: int, new: int, device: torch.device
    ) -> Tensor:
        """`[B, Q]` position of each new token, as the model rotates it."""
        if position_ids is None:
            start = self.columns - new
            return torch.arange(start, self.columns, device=device).expand(rows, new)
        if position_ids.ndim == 3:  # several axes, as in multimodal rotary embeddings
            if self.store is not None and self.store.plan.positions:
                raise ValueError(
                    f"recipe '{self.context.recipe}' needs one position per token, but this model "
                    f"rotates by {position_ids.shape[0]} axes"
                )
            position_ids = position_ids[0]
        return position_ids.to(device).expand(rows, -1)

    def _commit(self, store: LayerStore, forward: Forward) -> None:
        store.commit(forward)
        if store.sealing is not None:
            self.context.committed.append(store)

    def _accept_pending(self, drop: int = 0) -> None:
        if self.pending is not None and self.store is not None:
            forward, self.pending = self.pending, None
            self.store.commit(forward, drop)
            self.store.settled()

    # -- dense tensors for models that cannot take handles ---------------------------------------

    def _update_dense(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.store is not None
        B, H, Q, D = keys.shape
        seen = self.columns - Q
        columns = self._note_padding(self.context.columns_at(seen), seen, keys.device)
        self._check_dense_rows(columns, seen)
        positions = self._positions(self.context.position_ids, B, Q, keys.device)
        past = dense_of(self.store)
        call = Call(keys.new_zeros(B, H, 1, Q, D), 1.0)
        forward = self.store.stage(keys, values, call, columns, positions)
        if self.record_past:
            self.pending = forward
        else:
            self._commit(self.store, forward)
        if past is None:
            return keys, values
        return torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)

    def _note_padding(
        self, columns: Tensor | None, seen: int, device: torch.device
    ) -> Tensor | None:
        """Remember which columns were padding somewhere: they cannot be counted back."""
        if columns is None:
            return None
        bad = (~columns).any(0).nonzero()
        if bad.numel():
            self.padded_until = seen + int(bad.max()) + 1
        return columns.to(device)

    def _check_dense_rows(self, columns: Tensor | None, seen: int) -> None:
        """Dense tensors are right-aligned: rows must lose their oldest columns, and only those."""
        assert self.store is not None
        plan, rows = self.store.plan, len(self.store.seen)
        problem = None
        if columns is not None and bool((self.store.seen[~columns.all(1).cpu()] > 0).any()):
            problem = "padding after a row's first token"
        elif rows > 1 and plan.evicts and (plan.growing or plan.recipe.schedule != Lazy()):
            problem = "rows that keep different numbers of entries"
        elif rows > 1 and plan.evicts and self.context.masked_at != seen:
            problem = "eviction in a batch whose padding the cache cannot see (no model was given)"
        if problem is not None:
            raise ValueError(f"recipe '{plan.recipe}': the dense fallback cannot express {problem}")

    # -- what transformers asks ------------------------------------------------------------------

    def valid_tokens(self) -> Tensor | None:
        """Valid tokens of each row so far, drafts included: host int64 `[B]`."""
        if self.store is None or self.pending is None:
            return None if self.store is None else self.store.seen
        return self.store.seen + self.pending.tokens

    def get_seq_length(self) -> int:
        """Tokens seen (columns, padding included), never the physical length."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.context.handles:
            return query_length, self.columns
        # update() accepts what is pending before it answers
        self._accept_pending()
        kept = 0 if self.store is None else int(self.store.stored.max())
        return kept + query_length, self.columns - kept

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1  # the older name of get_max_length

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: `-n` removes n, a positive number is the length to keep.

        Exact while they are unverified drafts or nothing was compressed since; attention that they
        paid to older entries (h2o) is only taken back for drafts, and what was sealed with them stays
        sealed. Raises RuntimeError otherwise, and where a format's statistics cannot follow.
        """
        amount = int(tokens_to_remove)  # older transformers pass a tensor
        n = -amount if amount <= 0 else max(0, self.columns - amount)
        self.check_crop(n)
        if self.store is None:
            return
        self.context.masked_at = -1
        if self.pending is not None and n <= self.pending.block.longest:
            self._accept_pending(drop=n)
        elif n:
            drafts = 0 if self.pending is None else self.pending.block.longest
            self.pending = None
            self.store.drop_newest(n - drafts)
        self.columns -= n

    def check_crop(self, n: int) -> None:
        """Raise if the newest `n` columns cannot be forgotten; changes nothing."""
        if n > self.columns:
            raise ValueError(f"cannot remove {n} tokens: {self.columns} were seen")
        if n == 0 or self.store is None:
            return
        drafts = 0 if self.pending is None else self.pending.block.longest
        if n > drafts and self.columns - n < self.padded_until:
            raise RuntimeError(
                f"cannot remove the newest {n} columns: some of them were padding, which the cache "
                "does not hold; copy it before the turn"
            )
        if n > drafts:
            self.store.check_drop(n - drafts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            rows = torch.arange(len(self.store.seen))
            self._rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._rows(indices)

    def _rows(self, index: Tensor) -> None:
        if self.store is not None:
            self._accept_pending()
            self.store.rows(index)

    @property
    def batch_size(self) -> int:
        return -1 if self.store is None else len(self.store.seen)

    def abort(self, columns: int) -> bool:
        """Go back to `columns` after a forward broke off; False if that is no longer possible.

        Attention that the broken forward paid to older entries (h2o) is not taken back.
        """
        if self.columns <= columns:
            return self.columns == columns
        Q = self.columns - columns
        self.columns = columns
        if self.staged is not None or self.pending is not None:
            self.staged = self.pending = None
            return True
        if self.padded_until > columns:
            return False
        try:
            if self.store is not None:
                self.store.drop_newest(Q)
        except RuntimeError:
            return False
        return True


def _as_bool(mask: Tensor) -> Tensor:
    """A mask as bool (True: attend). Raises ValueError on an additive bias, which is no mask."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            f"the 4D attention mask {tuple(mask.shape)} holds values between 0 and -infinity: an "
            "additive bias cannot be applied to compressed entries"
        )
    return ~hidden

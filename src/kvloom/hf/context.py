"""What the layers of one cache share: the model's facts, and what one forward tells them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.core.store import LayerStore
from kvloom.hf import attention
from kvloom.hf.rope import attention_modules, decoder_of

CHECKED_EVERY = 16  # tokens without a mask; asking an accelerator means waiting for it


class Host:
    """The model behind a cache. Copies of a cache share it; the model is held weakly."""

    def __init__(self, model: nn.Module | None, config: Any):
        self._model = None if model is None else weakref.ref(model)
        self.config = config
        self._modules = (
            set() if model is None else {id(m) for m in attention_modules(model).values()}
        )

    def __deepcopy__(self, memo: object) -> Host:
        return self

    def check(self, module: nn.Module) -> None:
        """Raise ValueError if `module` (an attention) is not one of this model's."""
        config = getattr(module, "config", self.config)
        if config is self.config and (not self._modules or id(module) in self._modules):
            return
        raise ValueError(
            f"this cache was made for a {self.config.model_type!r} model and is used with another "
            f"one ({config.model_type!r}): make one cache per model"
        )

    def check_decoder(self, decoder: nn.Module) -> None:
        """Raise ValueError if `decoder` is not this model's."""
        if self.model is not None and decoder_of(self.model) is not decoder:
            raise ValueError(
                f"this cache was made for a {self.config.model_type!r} model and is used with another "
                "one: make one cache per model"
            )

    @property
    def model(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    @property
    def reads_handles(self) -> bool:
        """Whether the model's attention is ours right now."""
        return bool(self.config._attn_implementation == attention.NAME)


@dataclass
class Context:
    """Shared by all layers of one cache.

    Attributes:
        host, recipe, budget: as constructed. layers: how many layers are compressed.
        handles: whether `update` returns handles (fixed when a forward begins).
        columns: bool `[B, Q]`, which new columns are valid; None: all.
        masked_at: the length at which our mask function last ran; tells a stale mask and a
            user's 4D mask from ours.
        position_ids: of this forward, where the decoder hook captured them (dense mode).
        opened_at: length at which the forward on its way began; None between forwards.
        other_elements: numbers that layers which are not compressed hold per row, at most.
        last: index of the model's last layer, whose commit ends a forward.
        bad: per accelerator, whether a NaN or Inf went in; fresh: in the forward on its way. checked: when
            that was last asked, in units of `CHECKED_EVERY` tokens.
        committed: stores of the layers that have committed the forward on its way.
    """

    host: Host
    recipe: Recipe
    budget: Budget | None
    layers: int
    dense: bool = False
    track_positions: bool = False
    handles: bool = False
    columns: Tensor | None = None
    masked_at: int = -1
    position_ids: Tensor | None = None
    opened_at: int | None = None
    last: int = 0
    other_elements: int = 0
    bad: dict[torch.device, Tensor] = field(default_factory=dict)
    fresh: dict[torch.device, Tensor] = field(default_factory=dict)
    checked: int = 0
    committed: list[LayerStore] = field(default_factory=list)

    def end_forward(self) -> None:
        """The last layer has committed: the forward is whole, and its mask is no longer news."""
        self.opened_at, self.masked_at = None, -1
        for flag in self.fresh.values():
            _flag(self.bad, flag)
        self.fresh.clear()
        self.settle()

    def settle(self) -> None:
        """Let go of what was kept for taking a forward back."""
        for store in self.committed:
            store.settled()
        self.committed.clear()

    def learn(self, mask: Tensor | None, seen: int, new: int, held: Tensor | None = None) -> None:
        """Take the validity of the new columns from a 2D mask `[B, seen + new]`.

        `held` `[B]`: how many valid tokens each row has had. Raises ValueError if the mask is too
        short, or says otherwise of the past, and see `raise_bad`.
        """
        if seen and (mask is not None or seen // CHECKED_EVERY != self.checked):
            self.raise_bad()  # a mask is waited for in any case
            self.checked = seen // CHECKED_EVERY
        self.masked_at, self.columns = seen, None
        if mask is None:
            return
        if mask.shape[-1] < seen + new:
            raise ValueError(
                f"attention_mask has {mask.shape[-1]} columns, but the cache has seen {seen} tokens "
                f"and gets {new} more: pass the mask of all {seen + new} columns"
            )
        past = mask[:, :seen].ne(0).sum(1).cpu()
        if held is not None and len(held) == len(past) and not torch.equal(past, held):
            raise ValueError(
                f"attention_mask shows {past.tolist()} of the {seen} columns before this forward, but "
                f"{held.tolist()} were valid when they came: past columns cannot be hidden or shown "
                "afterwards in a compressed cache"
            )
        columns = mask[:, seen : seen + new].to(torch.bool)
        self.columns = None if bool(columns.all()) else columns

    def columns_at(self, seen: int) -> Tensor | None:
        """Validity of the columns of the forward that began at length `seen`."""
        return self.columns if self.masked_at == seen else None

    def check_finite(self, keys: Tensor, values: Tensor) -> None:
        """Raise ValueError on NaN or Inf; on an accelerator in the next `raise_bad`."""
        if keys.device.type != "cpu":
            _flag(self.fresh, ~(torch.isfinite(keys).all() & torch.isfinite(values).all()))
            return
        total = float(keys.sum()) + float(values.sum())
        if total - total == 0.0:  # finite
            return
        for name, x in (("keys", keys), ("values", values)):
            if not bool(torch.isfinite(x).all()):
                raise ValueError(_NOT_FINITE.format(name=name, shape=tuple(x.shape)))

    def raise_bad(self) -> None:
        """Wait for the device and raise ValueError if a NaN or Inf went in since the last `forget_bad`."""
        if any(bool(flag) for flag in self.bad.values()):
            said = _NOT_FINITE.format(name="keys or values", shape="of an earlier forward")
            raise ValueError(f"{said}. They are in the cache: call reset()")

    def forget_bad(self) -> None:
        """Nothing is in the cache any more."""
        self.bad.clear()
        self.fresh.clear()
        self.checked = 0


def _flag(flags: dict[torch.device, Tensor], flag: Tensor) -> None:
    """Remember a flag on its own device; nobody waits for it."""
    held = flags.get(flag.device)
    flags[flag.device] = flag if held is None else held | flag


_NOT_FINITE = (
    "{name} {shape} contain NaN or Inf: a compressed cache would spread them over whole pages; "
    "check the model's dtype and inputs"
)

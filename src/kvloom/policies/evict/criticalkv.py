"""CriticalKV: values weigh as much as attention (Feng et al., arXiv:2502.03805, algorithm 1).

    stage 1: the alpha b entries of largest a_j
    stage 2: the rest of the budget b by (a_j + eps) |v_j W_O|_1

What an eviction changes in the output is bounded by attention times the norm of the projected value,
provided that most of the attention is kept, which stage 1 ensures. a_j comes from another scorer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvloom.core.block import from_newest
from kvloom.core.entries import Entries
from kvloom.core.policy import Policy, Scorer, check, top_newest
from kvloom.core.recipe import Recipe

_BLOCK_ELEMENTS = 1 << 19  # projected values held at once: 2 MiB in fp32, which caches hold


@cache
def _scorer(text: str) -> Scorer | None:
    recipe = Recipe.parse(text)
    return recipe.scorer if recipe == Recipe(scorer=recipe.scorer) else None


def _of_base(name: str) -> Any:
    """A property or a method that is the base's own."""
    return property(lambda self: getattr(_scorer(self.base), name))


@dataclass(frozen=True)
class CriticalKV(Scorer):
    """Another scorer's attention, times the projected values' L1 norms, in two stages.

    Attributes:
        base: the other scorer as text, `criticalkv(base='snapkv(window=32)')`. Its scores must not
            be negative: h2o, snapkv, tova, expected_attention(value_norm=False), ...
        first_stage: alpha. epsilon: eps.

    The projection costs S E hidden multiplications per query head at every compression, far more
    than a decoded token does: combine it with `lazy(every=R)`.

    Deviations: with grouped queries the norms are averaged over the group; the base's recent window
    counts as chosen in stage 1; under `ada`, stage 1 is alpha of the even share of a head.
    """

    name: ClassVar[str] = "criticalkv"

    base: str = "snapkv"
    first_stage: float = 0.5
    epsilon: float = 1e-4

    pinned, capacity, protected = map(_of_base, ("pinned", "capacity", "protected"))
    sets_target, target, exempt_layers = map(_of_base, ("sets_target", "target", "exempt_layers"))
    state_names, arrive, observe = map(_of_base, ("state_names", "arrive", "observe"))
    remember, forget = map(_of_base, ("remember", "forget"))
    scores_attention, unscored = map(_of_base, ("scores_attention", "unscored"))

    def __post_init__(self) -> None:
        check(
            self, isinstance(self.base, str), "base is a scorer as text: base='snapkv(window=32)'"
        )
        base = _scorer(self.base)
        plain = base is not None and not base.in_cache and not isinstance(base, CriticalKV)
        check(self, plain, "base must be one scorer by attention, with original positions")
        sound = type(self.first_stage) in (int, float) and 0 <= self.first_stage <= 1
        check(self, sound, "first_stage must be within 0..1")
        number = type(self.epsilon) in (int, float) and 0 <= self.epsilon < float("inf")
        check(self, number, "epsilon must be a number >= 0")

    @property
    def _base(self) -> Scorer:
        return _scorer(self.base)  # type: ignore[return-value]  # checked in __post_init__

    @property
    def inner(self) -> tuple[Policy, ...]:
        return (self._base,)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self._base.needs | {"values", "output_weight"}

    def score(self, entries: Entries) -> Tensor:
        valid, target = entries.valid, entries.target
        assert target is not None
        attention = self._base.score(entries).float().masked_fill(~valid, 0.0)
        if bool((attention < 0).any()):
            raise ValueError(f"{self}: the scores of {self._base} are negative, so no attention")
        window = torch.minimum(self._base.protected(target), target).to(valid.device)[..., None]
        newer = from_newest(valid)
        first = attention.masked_fill(newer <= window, float("inf"))
        first = first.masked_fill(~valid, float("-inf"))
        chosen = top_newest(first, (target.double() * self.first_stage).long()) & valid
        critical = ((attention + self.epsilon) * _output_norm(entries)).masked_fill(~valid, 0.0)
        return critical + chosen * (critical.amax((1, 2), keepdim=True) + 1)


def _output_norm(entries: Entries) -> Tensor:
    """`|v_j W_O|_1` `[B, H, S]`, averaged over the query heads of a group."""
    values, weight = entries.values, entries.output_weight
    assert weight is not None
    B, H, S, _ = values.shape
    norm = values.new_zeros(B, H, S, dtype=torch.float32)
    step = max(1, _BLOCK_ELEMENTS // (B * weight.shape[-1]))
    for h in range(H):
        for projection in weight[h].float():
            for i in range(0, S, step):
                part = values[:, h, i : i + step].float() @ projection
                norm[:, h, i : i + step] += part.abs_().sum(-1)
    return norm / weight.shape[1]

"""The rules of `mp_kvm`'s parameters, alone and within a recipe, and the bias of its centroids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvloom.core.block import Block
from kvloom.core.plan import LayerPlan
from kvloom.core.policy import check

if TYPE_CHECKING:
    from kvloom.policies.merge.mp_kvm import MPKVM

_WORDS = {
    "metric": ("cosine", "euclidean"),
    "update": ("mean", "ema"),
    "positions": ("mean", "slot", "positionless"),
    "rope": ("pre", "post"),
}
_SWITCHES = ("adaptive_threshold", "per_head_clustering", "head_mean", "mass_bias")
# name -> the least that it may be, and whether None is allowed
_WHOLE = {
    "window_size": (1, True), "sinks": (0, False), "max_centroids": (1, False),
    "init_preserve_first_n": (1, True), "sample_stride": (1, False),
    "max_injected_centroids": (1, True), "flush_threshold": (0, False),
    "flush_interval": (0, False), "block": (1, False),
}  # fmt: skip


def check_parameters(self: MPKVM) -> None:
    """Raise ValueError if a parameter is out of range; what depends on others is `check_fit`'s."""
    for name, words in _WORDS.items():
        listed = ", ".join(map(repr, words))
        check(self, getattr(self, name) in words, f"{name} is one of {listed}")
    for name in _SWITCHES:
        check(self, type(getattr(self, name)) is bool, f"{name} is True or False")
    for name, (least, optional) in _WHOLE.items():
        value = getattr(self, name)
        sound = (optional and value is None) or (type(value) is int and value >= least)
        check(self, sound, f"{name} must be an int >= {least}" + (", or None" if optional else ""))
    lowest = -1 if self.metric == "cosine" else float("-inf")
    for name in ("similarity_threshold", "min_merge_similarity"):
        value = getattr(self, name)
        sound = (value is None and name != "similarity_threshold") or (
            _number(value) and lowest <= value <= 1
        )
        within = "within -1..1" if self.metric == "cosine" else "at most 1 (1 - distance)"
        check(self, sound, f"{name} is a {self.metric} similarity, {within}")
    quantile, ema = self.threshold_quantile, self.ema
    check(self, _number(quantile) and 0 <= quantile <= 1, "threshold_quantile must be within 0..1")
    check(self, _number(ema) and 0 <= ema < 1, "ema must be at least 0 and below 1")
    first = self.init_preserve_first_n or 0
    check(self, first <= self.max_centroids, "init_preserve_first_n is at most max_centroids")
    placed = self.rope == "pre" or self.positions == "mean"
    check(self, placed, "positions mean nothing to rotated keys; leave it out with rope='post'")
    layers = self.per_layer_injection
    sound = layers is None or (
        isinstance(layers, tuple) and all(type(i) is int and i >= 0 for i in layers)
    )
    check(self, sound, "per_layer_injection must be a tuple of layer numbers, such as (0, 1)")


def _number(x: Any) -> bool:
    return type(x) in (int, float) and x == x


def check_fit(self: MPKVM, plan: LayerPlan) -> None:
    """Raise ValueError if the recipe, the layers or other parameters contradict a parameter."""

    def rule(sound: bool, message: str) -> None:
        if not sound:
            raise ValueError(f"recipe '{plan.recipe}': {message}")

    scorer, default = plan.recipe.scorer, type(self)()
    assert scorer is not None
    if scorer in plan.recipe.policies:  # not the one that mp_kvm brought along
        rule(self.window_size is None, f"{scorer} says who stays; leave out window_size="
             f"{self.window_size}, which is for mp_kvm without a scorer")  # fmt: skip
        rule(self.sinks == default.sinks, f"{scorer} says who stays; leave out sinks="
             f"{self.sinks}, which is for mp_kvm without a scorer")  # fmt: skip
    beyond = [i for i in self.per_layer_injection or () if i >= plan.layers]
    rule(not beyond, f"per_layer_injection names layers {beyond}, but {plan.layers} are compressed, "
         "counted from 0")  # fmt: skip
    rule(self.flush_threshold > 0 or self.flush_interval == 0,
         f"flush_interval={self.flush_interval} lets no centroid wait without a flush_threshold")  # fmt: skip
    if self.per_head_clustering:
        rule(not self.head_mean, "head_mean compares clusters that heads share; say "
             "per_head_clustering=False")  # fmt: skip
        return
    alike = scorer.oldest_first and not plan.pools
    alike = alike and bool((plan.shares == plan.shares[:, :1]).all())
    rule(alike, "per_head_clustering=False folds a token in all heads at once, so that they must "
         "keep the same entries: use streaming_llm or recent, and no allocator over heads")  # fmt: skip


def bias(self: MPKVM, centroids: Block) -> Tensor:
    """Log mass, or 0 without `mass_bias`; -inf for empty slots and all but the heaviest.

    Of equally heavy ones the older slot is attended to.
    """
    mass = centroids.meta["mass"]
    bias, n = mass, self.max_injected_centroids
    if not self.mass_bias:
        bias = torch.where(mass > float("-inf"), 0.0, float("-inf"))
    if n is None or n >= mass.shape[2]:
        return bias
    order = torch.argsort(mass, dim=-1, descending=True, stable=True)
    return bias.scatter(2, order[..., n:], float("-inf"))

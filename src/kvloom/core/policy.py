"""The kinds of policy that a recipe chains with `|`: scorer, allocator, merger, format, schedule.

Policies are frozen dataclasses: their fields are their parameters, learned state lives in the
cache, and every method is pure. A policy declares in `needs` what must be observed for it;
nothing else is collected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kvloom.core.block import from_newest
from kvloom.kernels.layout import TILE

if TYPE_CHECKING:
    from kvloom.core.entries import Entries
    from kvloom.core.recipe import Recipe

NEEDS = frozenset({
    "attention_mass", "keys", "values", "pre_rope_keys", "positions", "queries", "pre_rope_queries",
    "output_weight", "rope",
})  # fmt: skip


def camel_to_snake(name: str) -> str:
    """`StreamingLLM` -> `streaming_llm`, `Int4` -> `int4`, `H2O` -> `h2o`."""
    out = ""
    for i, c in enumerate(name):
        starts_word = c.isupper() and i > 0 and name[i - 1].islower()
        out += ("_" if starts_word else "") + c.lower()
    return out


@dataclass(frozen=True)
class Policy:
    """Base of everything that can stand in a recipe."""

    kind: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name") or camel_to_snake(cls.__name__)
        unknown = set(cls.needs) - NEEDS if isinstance(cls.needs, frozenset) else set()
        if unknown:
            raise TypeError(f"{cls.__name__}.needs has {sorted(unknown)}; known: {sorted(NEEDS)}")

    @property
    def inner(self) -> tuple[Policy, ...]:
        """Policies that this one is made of, named by its parameters."""
        return ()

    def __or__(self, other: Policy | Recipe) -> Recipe:
        from kvloom.core.recipe import Recipe

        return Recipe.of(self) | other

    def __str__(self) -> str:
        """Recipe text: the name, and every parameter that is not at its default."""
        return self._text(lambda value, default: value != default)

    def as_given(self) -> str:
        """The same with those that equal their default but are of another type, for error messages."""
        return self._text(lambda value, default: (type(value), value) != (type(default), default))

    def _text(self, says: Callable[[Any, Any], bool]) -> str:
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        given = [f"{name}={pair[0]!r}" for name, pair in values.items() if says(*pair)]
        return self.name + (f"({', '.join(given)})" if given else "")


def check(policy: Policy, rule: bool, message: str) -> None:
    """Raise ValueError that restates the policy and the rule it breaks."""
    if not rule:
        raise ValueError(f"{policy.as_given()}: {message}")


def one_of(value: Any, numbers: tuple[int, ...]) -> bool:
    """Whether `value` is one of these ints: a float or a bool that equals one is none."""
    return type(value) is int and value in numbers


@dataclass
class Queries:
    """The queries of one forward, as a scorer may look at them.

    Attributes:
        states: `[B, H, G, Q, D]`, G queries for each KV head, after rotation; before it if the
            scorer needs `pre_rope_queries`.
        positions: int64 `[B, Q]`. valid: bool `[B, Q]`, False for padding.
    """

    states: Tensor
    positions: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Scorer(Policy):
    """Importance of each entry per head; who stays is decided here, once for all scorers.

    Subclasses implement `score`, and if they keep state per slot, `arrive` and `observe`. The
    entries exclude the pinned sinks.

    Attributes:
        scores_attention: whether scores are attention, never below 0, so that their ratios mean
            something.
    """

    kind: ClassVar[str] = "scorer"
    scores_attention: ClassVar[bool] = False

    @property
    def pinned(self) -> int:
        """How many first valid tokens of a row are pinned, exact and never evicted."""
        return 0

    @property
    def capacity(self) -> int | None:
        """Entries per KV head that the scorer itself asks for (sinks included); None: the budget's."""
        return None

    @property
    def sets_target(self) -> bool:
        """Whether `target` says how many entries stay, instead of a budget and a schedule."""
        return False

    @property
    def exempt_layers(self) -> tuple[int, ...]:
        """Layers (counted among the compressed ones) from which nothing is ever evicted."""
        return ()

    @property
    def in_cache(self) -> bool:
        """Whether positions are those in the cache (the query is rotated), not the original ones."""
        return False

    @property
    def oldest_first(self) -> bool:
        """Whether the oldest entry that is not pinned always goes first, so that nothing need be
        scored.
        """
        return False

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the fp32 slot state that `arrive` creates."""
        return ()

    @property
    def unscored(self) -> int:
        """How many of the newest entries are kept without looking at them: what `score` says of those
        means nothing.
        """
        return 0

    def protected(self, capacity: Tensor) -> Tensor:
        """How many of the newest entries are always kept, given the capacity `[B, H]` (host)."""
        return torch.ones_like(capacity)

    def target(self, length: Tensor, seen: Tensor, new: Tensor) -> Tensor:
        """Entries to keep after a forward, sinks included, host int64 `[B, H]`; more than `length
        [B, H]` means all. Only asked if `sets_target`.

        `seen`, `new`: valid tokens of each row so far, and in this forward, host int64 `[B, 1]`.
        """
        raise NotImplementedError

    def arrive(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Slot state of newly arrived exact entries `[B, H, S, D]`: name -> fp32 `[B, H, S]`."""
        return {}

    def observe(self, state: dict[str, Tensor], observed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Slot state after a forward, elementwise; `observed` holds what `needs` asked for."""
        return state

    def remember(self, memory: dict[str, Tensor], queries: Queries) -> dict[str, Tensor]:
        """What a layer remembers of its queries, after one more forward.

        `memory` is empty at first. Every tensor has rows first, `[B, ...]`; its shape must not
        depend on how many tokens were seen, since budgets reserve room for it. Called only if the
        scorer needs `queries` or `pre_rope_queries`.
        """
        return memory

    def forget(self, memory: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """The memory without the newest `n` tokens of every row, which a `crop` takes back; statistics
        that cannot do without them again stay as they are.
        """
        return memory

    def score(self, entries: Entries) -> Tensor:
        """Importance `[B, H, S]`; larger stays."""
        raise NotImplementedError

    def rank(self, entries: Entries, protected: Tensor) -> Tensor:
        """Scores ready to be compared, fp32 `[B, H, S]`: +inf for the newest `protected [B, H]`,
        -inf for slots that are not valid. Entries that only go by whole tiles get the tile's mean.

        Raises ValueError if a score is NaN or infinite.
        """
        valid, tiled = entries.valid, entries.tiled
        scores = entries.scores = self.score(entries).float()
        if not bool((torch.isfinite(scores) | ~valid).all()):
            raise ValueError(f"{self}: a score is NaN or infinite")
        newer = from_newest(valid)
        scores = scores.masked_fill(newer <= protected.to(scores.device)[..., None], float("inf"))
        scores = scores.masked_fill(~valid, float("-inf"))
        if tiled:
            scores[..., :tiled] = _tile_mean(scores[..., :tiled], valid[..., :tiled])
        return scores


def select(scores: Tensor, entries: Entries, target: Tensor) -> Tensor:
    """Which entries stay, by ranked scores: bool `[B, H, S]`, at most `target [B, H]` per head.

    Equal scores keep the newer. A tile that does not fit as a whole goes, so that up to 31 entries
    fewer stay where entries only go by whole tiles.
    """
    keep, valid, tiled = top_newest(scores, target), entries.valid, entries.tiled
    if tiled:
        whole = (keep | ~valid)[..., :tiled].unflatten(-1, (-1, TILE)).all(-1)
        keep[..., :tiled] &= whole.repeat_interleave(TILE, -1)
    return keep & valid


def _tile_mean(scores: Tensor, valid: Tensor) -> Tensor:
    """Every slot's score replaced by the mean over the live slots of its tile."""
    total = scores.masked_fill(~valid, 0).unflatten(-1, (-1, TILE)).sum(-1)
    mean: Tensor = total / valid.unflatten(-1, (-1, TILE)).sum(-1)  # 0 / 0: a dead tile
    return mean.nan_to_num(nan=float("-inf"), posinf=float("inf")).repeat_interleave(TILE, -1)


def top_newest(scores: Tensor, target: Tensor) -> Tensor:
    """The `target [B, H]` (host) best of `scores [B, H, S]` as bool; ties go to the larger index."""
    S = scores.shape[-1]
    gone = (S - target).clamp(0, S)
    most = int(gone.max())
    if not most:
        return torch.ones_like(scores, dtype=torch.bool)
    gone = gone.to(scores.device)[..., None]
    if most == 1:  # a token came, a token goes: nothing need be sorted
        last = scores.amin(-1, keepdim=True)
    else:
        worst = torch.topk(scores, most, largest=False).values
        last = worst.gather(-1, (gone - 1).clamp_min(0))
    worse, equal = scores < last, scores == last
    of_equal = gone - worse.sum(-1, keepdim=True)  # the oldest of these go
    if bool((equal.sum(-1, keepdim=True) > of_equal).any()):
        equal &= equal.cumsum(-1) <= of_equal
    return ~(worse | equal)


@dataclass(frozen=True)
class Allocator(Policy):
    """How a budget is split over layers and heads.

    `shares` splits it once and for all. An allocator with `pools = True` also lets the heads of a
    layer share their budget anew at every compression: the schedule then looks at the sum over a
    row's heads, and `split` divides what may stay.
    """

    kind: ClassVar[str] = "allocator"
    pools: ClassVar[bool] = False

    def shares(self, layers: int, heads: int) -> Tensor:
        """Relative budget of each KV head: host fp64 `[layers, heads]`, normalised to mean 1."""
        return torch.ones(layers, heads, dtype=torch.float64)

    def split(self, scores: Tensor, valid: Tensor, total: Tensor) -> Tensor:
        """Entries for each head, host int64 `[B, H]`, adding up to at most `total [B]` (host).

        `scores [B, H, S]` are ranked (+inf protected, -inf not `valid`). Only asked if `pools`.
        """
        raise NotImplementedError

    def largest(self, capacity: Tensor) -> Tensor:
        """The most entries that `split` may give one head, host int64 `[B, 1]`, if `capacity [B, H]`
        is what the heads have together.
        """
        return capacity.amax(1, keepdim=True)

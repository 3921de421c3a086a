"""Mergers: what becomes of the entries that a selection leaves out. Without one they are dropped.

Two kinds. A `CentroidMerger` folds losers into mutable centroids, a tier of their own, exact and in
the model's dtype, never packed. A `SurvivorMerger` folds them into the exact entries that stay, before
those are sealed. In both, `mass` is the log of how many tokens an entry stands for, and attention adds
it to the entry's logit, so that n tokens with the same key and value attend like the n that they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvloom.core.policy import Policy, Queries

if TYPE_CHECKING:
    from kvloom.core.block import Block
    from kvloom.core.plan import LayerPlan

Memory = dict[str, Tensor]


@dataclass(frozen=True)
class Merger(Policy):
    """Base of both kinds."""

    kind: ClassVar[str] = "merger"

    @property
    def conserves(self) -> bool:
        """Whether every token that lives on is counted in the mass of some entry."""
        return True

    @property
    def centroids(self) -> int:
        """How many centroids per head the merger keeps; reserved in every budget."""
        return 0

    @property
    def state_names(self) -> tuple[str, ...]:
        """Fp32 slot state of exact entries, 0 on arrival; `mass` among it is added to their logits."""
        return ()

    @property
    def own_scorer(self) -> str | None:
        """Recipe text of the scorer that it brings along where the recipe names none."""
        return None

    def serves(self, layer: int) -> bool:
        """Whether it acts in this layer (counted among the compressed ones); elsewhere losers drop."""
        return True

    @property
    def reads_attention(self) -> bool:
        """Whether it takes the scorer's scores for attention."""
        return False

    def fit(self, plan: LayerPlan) -> None:
        """Raise ValueError if the rest of the recipe does not suit it."""
        scorer = plan.recipe.scorer
        if self.reads_attention and not (scorer and scorer.scores_attention):
            raise ValueError(
                f"recipe '{plan.recipe}': {self} takes scores for attention, which those of {scorer} "
                "are not; use h2o, tova, snapkv, expected_attention or criticalkv"
            )

    def memory(self, rows: int, heads: int) -> Memory:
        """What it remembers from one fold to the next, at first: `[B, ...]` tensors of constant shape."""
        return {}

    def remember(self, memory: Memory, queries: Queries) -> Memory:
        """The memory after one more forward; called only if it needs `queries`, see `Scorer.remember`."""
        return memory

    def forget(self, memory: Memory, n: int) -> Memory:
        """The memory without the newest `n` tokens of every row, which a `crop` takes back; statistics
        that cannot do without them again stay as they are.
        """
        return memory


@dataclass
class Losers:
    """What a centroid merger gets: entries that were not selected, oldest first, decoded once.

    Attributes:
        keys: `[B, H, N, D]` fp32, pre-RoPE if the merger needs `pre_rope_keys`; values likewise.
        mass: log mass `[B, H, N]`; positions: `[B, H, N]`; valid: bool `[B, H, N]`.
    """

    keys: Tensor
    values: Tensor
    mass: Tensor
    positions: Tensor
    valid: Tensor


@dataclass(frozen=True)
class CentroidMerger(Merger):
    """Folds losers into centroids, pre-RoPE or as attention uses them.

    Attributes:
        rotated: whether centroids hold keys as attention uses them; else they are pre-RoPE.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pre_rope_keys", "positions"})

    @property
    def rotated(self) -> bool:
        return "pre_rope_keys" not in self.needs

    @property
    def placing(self) -> str:
        """Where pre-RoPE centroids stand: `"mean"` of their members' positions (fractional), `"slot"`:
        right before the exact entries, one place each, in the order of their mean positions, so that
        the distance stays bounded; `"positionless"`: at no distance from any query.
        """
        return "mean"

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of the centroids, given the model's."""
        return model

    def fold(self, losers: Losers, centroids: Block) -> Block:
        """The centroids after taking in the losers; pure, and never more than `self.centroids`.

        `centroids.meta` has `mass` (-inf where empty) and `positions`, fp32 `[B, H, n]`.
        """
        raise NotImplementedError

    def ingest(self, losers: Losers, centroids: Block, memory: Memory) -> tuple[Block, Memory]:
        """`fold` for mergers that remember something between folds."""
        return self.fold(losers, centroids), memory

    def takes(self, losers: Losers) -> Tensor | None:
        """Which of the losers are folded, bool `[B, H, N]`, the others dropped; None: all."""
        return None

    def bias(self, centroids: Block) -> Tensor:
        """What is added to the centroids' logits, `[B, H, n]`; -inf hides one."""
        return centroids.meta["mass"]


@dataclass
class Group:
    """What a survivor merger gets: every evictable entry of a layer, side by side, oldest first.

    Attributes:
        keys: `[B, H, S, D]` as attention uses them, values: `[B, H, S, E]`; fp32.
        lost, kept: bool `[B, H, S]`, who leaves and who stays.
        open: bool `[B, H, S]`, who stays and may be changed; the rest of `kept` is sealed.
        state: the merger's slot state, fp32 `[B, H, S]` each.
        scores: what the scorer thinks of them, `[B, H, S]`; larger is more important.
        scored: bool `[B, H, S]`, whose score means something; not those that the scorer keeps without
            looking at them (`Scorer.unscored`), such as snapkv's observation window.
        positions: original token indices, int32 `[B, H, S]`, if the merger needs `positions`.
        memory: what the merger remembers. scale, softcap: of the attention logits.
        layer: index among the compressed layers.
    """

    keys: Tensor
    values: Tensor
    lost: Tensor
    kept: Tensor
    open: Tensor
    state: dict[str, Tensor]
    scores: Tensor
    scored: Tensor
    positions: Tensor | None
    memory: Memory
    scale: float
    softcap: float | None
    layer: int


@dataclass
class Merged:
    """What a survivor merger makes of a `Group`: new keys, values and slot state, None where nothing
    changes. Only what is `open` may differ.

    Attributes:
        folded: bool `[B, H, S]`, the losers that live on in others; None: all of them.
    """

    values: Tensor | None = None
    keys: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
    folded: Tensor | None = None


@dataclass(frozen=True)
class SurvivorMerger(Merger):
    """Folds losers into the exact entries that stay.

    Sinks are left alone. So are entries that a packed format has sealed already, since nothing is
    quantized twice; dense pages can be changed. What a sealed entry would have taken in is dropped, and
    not handed to the few open ones: those would be flooded by tokens that do not resemble them.
    """

    def merge(self, group: Group) -> Merged:
        """Pure; see `Group` and `Merged`."""
        raise NotImplementedError

"""Nearest: a loser is averaged into the survivor whose key is most like its own.

    j -> i = argmax_kept cos(k_j, k_i)
    v_i <- (n_i v_i + sum_j n_j v_j) / (n_i + sum_j n_j),   n_i <- n_i + sum_j n_j

Values only: what kvpress has as its merging press, and ToMe (arXiv:2210.09461) without its
proportional attention. Keys and values: the averaging that KVMerger (arXiv:2407.08454) and
Chelsea (arXiv:2506.11418) do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvloom.core.merge import Group, Merged, SurvivorMerger
from kvloom.core.policy import check
from kvloom.policies.merge._nearest import add_to, mean_into, nearest_open


@dataclass(frozen=True)
class Nearest(SurvivorMerger):
    """Average losers into their most similar survivors, each token counting the same.

    Attributes:
        keys: average the keys too. They are rotated already, each by its own position, so that the
            mean of two distant tokens keeps little of their fast-turning dimensions: expect this
            to lose, and mostly where tokens far apart are averaged.

    How many tokens an entry stands for only weighs the next mean: attention does not know of it, so
    that a mean of n attends like a single token. `mass_fold` differs in just that.

    Deviations: KVMerger merges runs of neighbours before anything is evicted, weighted by a Gaussian
    kernel around a pivot; here it is always the losers of the recipe's scorer, wherever they are,
    and every token weighs the same. Losers whose most similar survivor is sealed are dropped.
    Of survivors whose cosines differ by less than 1 in 65,536 the oldest is the most similar.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    keys: bool = False

    def __post_init__(self) -> None:
        check(self, type(self.keys) is bool, "keys is True or False")

    @property
    def conserves(self) -> bool:
        return False

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("taken",)

    def merge(self, group: Group) -> Merged:
        cosine, index = nearest_open(group.keys, group.lost, group.kept, group.open)
        folded = torch.isfinite(cosine)
        count = 1 + group.state["taken"]
        added = count.masked_fill(~folded, 0.0)

        values = mean_into(index, added, count, group.values)
        keys = mean_into(index, added, count, group.keys) if self.keys else None
        taken = add_to(index, added, group.state["taken"])
        return Merged(values, keys, state={"taken": taken}, folded=folded)

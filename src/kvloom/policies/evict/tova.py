"""TOVA: drop what the last token looks at least (Oren et al., arXiv:2401.06104).

    score_j = mean over all query heads h of the layer of softmax(q_t^h k_j^h / sqrt(d))

A transformer whose state has a fixed size: at every step the entry with the least attention from
the current token leaves, and all heads of a layer keep the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Queries, Scorer, check
from kvloom.policies.evict._attention import attention_from, forget_newest, remember_newest


@dataclass(frozen=True)
class TOVA(Scorer):
    """Attention of the last query, averaged over the layer.

    Attributes:
        per_head: average over the query group only, so that each KV head keeps its own tokens (the
            paper's ablation found the layer's average to be better).

    Deviations: the prompt (or a chunk of it) is compressed at once by the attention of its last
    token, as in the authors' code, and not token by token; the newest entry always stays. If heads
    hold different tokens (unequal budgets), a head without a token counts as paying it nothing.
    Merged entries and a model's sink logits take no part in the softmax.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "positions"})
    scores_attention: ClassVar[bool] = True

    per_head: bool = False

    def __post_init__(self) -> None:
        check(self, type(self.per_head) is bool, "per_head must be True or False")

    def remember(self, memory: dict[str, Tensor], queries: Queries) -> dict[str, Tensor]:
        return remember_newest(memory, queries, 1)

    def forget(self, memory: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        return forget_newest(memory, n)

    def score(self, entries: Entries) -> Tensor:
        received = attention_from(entries, entries.memory).mean(2)
        if self.per_head:
            return received
        positions, valid = entries.positions, entries.valid
        same = (valid == valid[:, :1]) & ((positions == positions[:, :1]) | ~valid)
        if bool(same.all()):  # a slot is the same token in all heads
            return received.mean(1, keepdim=True).expand_as(received)
        return _mean_by_token(received, positions.long(), valid)


def _mean_by_token(x: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """`x [B, H, S]` averaged over the heads, token by token; heads without it add nothing."""
    token = positions.masked_fill(~valid, -1).flatten(1)
    order = torch.argsort(token, dim=-1, stable=True)
    in_order = token.gather(-1, order)
    run = torch.zeros_like(token)
    run[:, 1:] = (in_order[:, 1:] != in_order[:, :-1]).cumsum(-1)
    values = x.flatten(1)
    total = torch.zeros_like(values).scatter_add(-1, run, values.gather(-1, order))
    mean = torch.empty_like(values).scatter(-1, order, total.gather(-1, run))
    return mean.view_as(x) / x.shape[1]

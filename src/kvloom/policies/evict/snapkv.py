"""SnapKV: the end of a prompt knows what it needs of it (Li et al., arXiv:2404.14469).

    a_j = mean over the last W queries t of softmax_t(j),   score_j = pool_k(a)_j

The attention of an observation window of W queries, smoothed over k neighbours so that clusters
stay whole, ranks everything before the window; the window itself is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvloom.core.block import from_newest
from kvloom.core.entries import Entries
from kvloom.core.policy import Queries, Scorer, check
from kvloom.policies.evict._attention import attention_from, forget_newest, remember_newest


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Pooled attention of the last queries, and the last entries.

    Attributes:
        window: W, observed queries, whose entries always stay. kernel: k, odd; 1: no pooling.
        pooling: `"avg"` or `"max"`.

    One shot and chunks: if the prompt comes in one forward, the window is the end of the prompt
    and the selection is the paper's. In chunks (`prefill_chunk_size`, several turns), each chunk is
    followed by a selection with its own last W queries, since a budget holds at all times: what an
    early window ignored is gone before the question arrives. Likewise the paper never evicts while
    decoding; here the newest W queries decide then, at every token or as `lazy(every=R)` says, which
    is W times the work of attention itself: prefer R >= W.

    Deviations: with grouped queries the pooled attention is averaged over the group (the paper's
    models have one query head per KV head); neighbours are entries that are still there; a budget
    below W keeps the newest. Merged entries and a model's sink logits take no part in the softmax.
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})
    scores_attention: ClassVar[bool] = True

    window: int = 32
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self) -> None:
        check(self, type(self.window) is int and self.window >= 1, "window must be an int >= 1")
        odd = type(self.kernel) is int and self.kernel >= 1 and self.kernel % 2 == 1
        check(self, odd, "kernel must be an odd int >= 1")
        check(self, self.pooling in ("avg", "max"), "pooling is 'avg' or 'max'")

    @property
    def unscored(self) -> int:
        return self.window

    def protected(self, capacity: Tensor) -> Tensor:
        return capacity.clamp_max(self.window)

    def remember(self, memory: dict[str, Tensor], queries: Queries) -> dict[str, Tensor]:
        return remember_newest(memory, queries, self.window)

    def forget(self, memory: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        return forget_newest(memory, n)

    def score(self, entries: Entries) -> Tensor:
        valid = entries.valid
        newer = from_newest(valid)
        before = (valid & (newer > self.window))[:, :, None]
        received = attention_from(entries, entries.memory).masked_fill(~before, 0.0)
        return self._pool(received, valid).mean(2)

    def _pool(self, x: Tensor, valid: Tensor) -> Tensor:
        """`x [B, H, G, S]` pooled over the entries that are there, as if nothing were between them."""
        if self.kernel == 1:
            return x
        S = valid.shape[-1]
        place = torch.where(valid, valid.cumsum(-1) - 1, S)[:, :, None].expand_as(x)
        closed = x.new_zeros(*x.shape[:-1], S + 1).scatter(-1, place, x)[..., :S]
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        smooth = pool(
            closed.flatten(0, 2)[:, None], self.kernel, stride=1, padding=self.kernel // 2
        )
        return smooth.view_as(closed).gather(-1, place.clamp_max(S - 1))

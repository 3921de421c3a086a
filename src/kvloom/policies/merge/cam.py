"""CaM, Cache Merging: an evicted value is spread over the survivors that follow it, now and then.

    Zhang et al., ICML 2024 (PMLR 235:58840)

    p_i = clamp(A_i / mean(A_j .. A_j+m), 0, 1),   mask_i ~ Bernoulli(p_i)
    V_j <- V_j + mask_i V_i / m   for the m survivors j that follow i

A is attention received. Keys do not change. In expectation attention loses nothing: the m carriers
receive m mean(A) / m times p_i = A_i on behalf of V_i, unless p_i was clamped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.core.merge import Group, Merged, SurvivorMerger
from kvloom.core.policy import check
from kvloom.policies._hash import draws
from kvloom.policies.merge._counts import finest

_PURPOSE = 0xCA3  # with `random` as the scorer, one seed must not draw the same numbers twice


@dataclass(frozen=True)
class Cam(SurvivorMerger):
    """Spread the values of losers over the next survivors, by chance, according to attention.

    Attributes:
        spread: m, over how many survivors, in the order of their positions; fewer if there are not
            that many. Only survivors that the scorer has scored count (none of snapkv's window):
            what attention the others would pay for the loser, and so its chance, is not known.
        seed: of the chance. A draw is a hash of seed, layer, KV head and original position, so that
            batching, padding and chunking cannot change it.

    Deviations: A are the scorer's scores (accumulated for h2o, over a window for snapkv), where the
    published code takes the attention of the current step. Its mean over the m carriers is the
    paper's; the published code takes the mean over the whole recent window. With fewer than m carriers
    V is divided by their number, which keeps the expectation; without any the loser is dropped.
    Carriers that are sealed take nothing, and their share is lost, so that the few entries which
    are open do not carry it all.

    An audit (arXiv:2607.05399) found that it never triggered in the evaluation that it checked;
    `stats().merged` over `stats().evicted` says how often it does. On the testbed model, after
    snapkv, it spreads 17 % of the losers where 25 % are kept and 9 % where 6.25 % are.

    Raises ValueError, when a cache is made, if the scorer's scores are no attention.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values", "positions"})

    spread: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, type(self.spread) is int and self.spread > 0, "spread must be an int above 0")
        check(self, type(self.seed) is int, "seed must be an int")

    @property
    def conserves(self) -> bool:
        return False

    @property
    def reads_attention(self) -> bool:
        return True

    def merge(self, group: Group) -> Merged:
        scores = group.scores.masked_fill(~(group.lost | group.kept), 0.0)
        fine = finest(scores.device)
        scores = scores.to(fine)
        assert group.positions is not None
        chain = group.kept & group.scored
        before = chain.cumsum(-1)  # survivors up to here; the next one is number `before`
        after = (before + self.spread).clamp_max(before[..., -1:])
        carriers = after - before

        order = torch.argsort(~chain, dim=-1, stable=True)  # the slot of survivor number r
        among = torch.stack([scores * chain, (chain & group.open).to(fine)])
        sums = pad(among.gather(3, order.expand_as(among)).cumsum(-1), (1, 0))
        total, takers = (x.gather(2, after) - x.gather(2, before) for x in sums)
        mean = total / carriers.clamp_min(1)
        chance = torch.where(mean > 0, scores / mean, (scores > 0).to(fine))
        draw = draws(group.positions, self.seed, _PURPOSE, group.layer)
        folded = group.lost & (takers > 0) & (draw < chance)

        some = folded.any(0).any(0).nonzero().flatten()  # decoding loses few of many
        first, stop, share = (x[..., some] for x in (before, after, folded / carriers.clamp_min(1)))
        given = _between(first, stop, share[..., None] * group.values[:, :, some].to(fine), before)
        took = _between(first, stop, folded[..., some, None].to(fine), before) > 0
        values = torch.where(
            took & (chain & group.open)[..., None], group.values + given, group.values
        )
        return Merged(values.float(), folded=folded)


def _between(first: Tensor, stop: Tensor, x: Tensor, before: Tensor) -> Tensor:
    """For each survivor, the sum of all `x [B, H, N, E]` whose `first <= number < stop [B, H, N]`.

    `before [B, H, S]`: survivors up to each slot, itself included.
    """
    B, H, N, E = x.shape
    S = before.shape[2]
    steps = x.new_zeros(B, H, S + 1, E)
    for at, sign in ((first, 1), (stop, -1)):
        steps.scatter_add_(2, at[..., None].expand(B, H, N, E), sign * x)
    number = (before - 1).clamp_min(0)[..., None].expand(B, H, S, E)
    return steps.cumsum(2).gather(2, number)

"""Attention received by each entry, given the normaliser: the second pass that h2o needs.

The definition is `reference.attention_mass`. Here a block of queries at a time meets the keys that it
may see, in one matrix per head that stays small enough for the caches and is changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 20  # of a block's weights, per KV head: 4 MiB


def attention_mass(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    voters: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """As `reference.attention_mass`: fp32 `[B, H, S]`.

    `causal`: query i sees entries 0 .. i; then there are as many entries as queries, and no `mask`.
    """
    B, H, G, Q, _ = query.shape
    S = keys.shape[2]
    keys = keys.float().transpose(2, 3)
    lse = lse.clamp_min(torch.finfo(torch.float32).min)
    if voters is not None:  # a weight of exp(-inf) is no vote
        lse = lse.masked_fill(~voters[:, None, None], float("inf"))
    total = query.new_zeros(B, H, S, dtype=torch.float32)
    step = max(1, _ELEMENTS // max(1, G * S))
    for i in range(0, Q, step):
        j = min(i + step, Q)
        seen = j if causal else S
        rows = (query[:, :, :, i:j].float() * scale).reshape(B, H, G * (j - i), -1)
        weights = torch.matmul(rows, keys[..., :seen])
        if softcap is not None:
            weights.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            weights.add_(bias[:, :, None, :seen])
        weights = weights.view(B, H, G, j - i, seen)
        if causal:
            later = torch.ones(j - i, j - i, dtype=torch.bool, device=keys.device).triu(1)
            weights[..., i:].masked_fill_(later, float("-inf"))
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., i:j, :]
            weights.masked_fill_(~part.unsqueeze(-3), float("-inf"))
        weights.sub_(lse[..., i:j, None]).exp_()
        total[..., :seen] += weights.sum(dim=(2, 3))
    return total

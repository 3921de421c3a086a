"""Which survivor a loser goes to: the one whose key is most like its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvloom.policies.merge._counts import UNIT

_BLOCK_ELEMENTS = 1 << 24  # similarities held at once: 64 MiB in fp32


def nearest_open(keys: Tensor, lost: Tensor, kept: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry, its cosine `[B, H, S]` to the most similar one of `kept`, and the index `[B, H,
    S]` of that one. Of equals the oldest wins.

    `keys [B, H, S, D]`; `lost`, `kept` and `open_` are bool `[B, H, S]`. The cosine is -inf if the
    entry is not lost, if nothing is kept, or if the most similar one is not open: it is sealed, and to
    send the entry to the best of the few that are open instead would put far more into those than
    resembles them.

    Equal are cosines that round to the same multiple of 1 / UNIT: in a run of one token, a key is as like
    its copy one place before as the one after, since rotation only knows distances, and the last bits
    of fp32, which differ from batch to batch, must not choose between them.
    """
    unit = normalize(keys.float(), dim=-1)
    B, H, S, _ = unit.shape
    best = unit.new_full((B, H, S), float("-inf"))
    index = torch.zeros(B, H, S, dtype=torch.int64, device=keys.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, B * H * S))
    columns = lost.any(0).any(0).nonzero().flatten()  # decoding loses few of many
    for part in columns.split(step):
        cosine = unit[:, :, part] @ unit.transpose(2, 3)
        cosine = cosine.masked_fill_(~kept[:, :, None], float("-inf"))
        first = (cosine * UNIT).round_().max(-1).indices
        best[:, :, part] = cosine.gather(3, first[..., None])[..., 0]
        index[:, :, part] = first
    return best.masked_fill(~(lost & open_.gather(2, index)), float("-inf")), index


def add_to(index: Tensor, weight: Tensor, into: Tensor, x: Tensor | None = None) -> Tensor:
    """`into` plus, at `index [B, H, S]`, each entry's `weight [B, H, S]` (times `x [B, H, S, E]`)."""
    if x is None:
        return into.scatter_add(2, index, weight)
    at = index[..., None].expand(*index.shape, x.shape[3])
    return into.scatter_add(2, at, x * weight[..., None])


def mean_into(index: Tensor, weight: Tensor, own: Tensor, x: Tensor) -> Tensor:
    """`x [B, H, S, E]` with each entry a weighted mean of itself, by `own [B, H, S]`, and of those
    that go there, by `weight [B, H, S]`; what takes nothing in stays as it is, to the bit.
    """
    total = add_to(index, weight, own)
    summed = add_to(index, weight, x * own[..., None], x)
    return torch.where((total > own)[..., None], summed / total[..., None], x)
